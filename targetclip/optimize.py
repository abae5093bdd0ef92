"""The teacher: find a direction in W+ by optimization, for many targets at once.

Knows the method (losses, schedule, recipes); nothing of files, launchers or printing. Arrays in,
arrays out. Rows of a batch never meet: a batch of targets gives what each target gives alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from targetclip.embedder import ImageEmbedder, Preprocess
from targetclip.generators import Generator
from targetclip.losses import Differences, consistency_loss, transfer_loss

Initial = Literal["inversion", "random", "zero"]

COEFFICIENT_RATE = 0.2  # the release steps its coefficients at this rate, whatever the schedule
COEFFICIENT_DECAY = 0.01


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a direction comes out as, but for the seed and the sources."""

    sources: int
    """Sources edited at every step."""
    fresh_sources: bool
    """Draw them anew from the bank at every step, or keep its first ones throughout."""
    steps: int
    learning_rate: float
    """Of Adam, at its highest (see `learning_rate`)."""
    transfer_weight: float
    consistency_weight: float
    differences: Differences
    """Consistency between differences of unit or of raw embeddings."""
    weight_decay: float
    """Of Adam: the gradient of weight_decay/2 |direction|^2, added inside it."""
    preprocess: Preprocess
    """How generated images reach the encoder."""
    target_preprocess: Literal["encoder", "same"]
    """How the target reaches it: as the encoder's own library does, or as generated images do."""
    initial: Initial
    """What the direction starts from."""
    coefficients: bool = False
    """Scale the direction by a learned factor for each source (release)."""
    keep: Literal["best", "last"] = "last"
    """Return the direction of the lowest loss, or the last one."""
    tied_layers: bool = False
    """One w_dim vector for all layers (a direction in W) instead of one each (W+)."""
    patience: int | None = None
    """Stop a target whose smoothed loss has not improved by 0.001 for so many steps."""

    def __post_init__(self) -> None:
        if self.coefficients and self.fresh_sources:
            raise ValueError("coefficients belong to fixed sources: set fresh_sources=False")
        if min(self.sources, self.steps) < 1:
            raise ValueError(
                f"expected at least 1 source and 1 step, found {self.sources} and {self.steps}"
            )


RECIPES: dict[str, Recipe] = {
    # The final released code, with its quirks: the target is normalised for CLIP, the generated
    # images are not; each source has a coefficient whose Adam is made anew at every step.
    "release": Recipe(
        sources=4,
        fresh_sources=False,
        steps=1000,
        learning_rate=0.2,
        transfer_weight=1.0,
        consistency_weight=0.5,
        differences="unit",
        weight_decay=3e-3,
        preprocess="release",
        target_preprocess="encoder",
        initial="inversion",
        coefficients=True,
        keep="best",
    ),
    # The first version of the paper: one preprocessing for all, random start, no coefficients.
    "paper": Recipe(
        sources=6,
        fresh_sources=False,
        steps=1000,
        learning_rate=0.2,
        transfer_weight=1.0,
        consistency_weight=0.6,
        differences="raw",
        weight_decay=3e-3,
        preprocess="release",
        target_preprocess="same",
        initial="random",
        keep="best",
    ),
    # Ours: every step meets fresh sources, target and images are preprocessed alike, and nothing
    # but the losses decides where it goes.
    "consistent": Recipe(
        sources=6,
        fresh_sources=True,
        steps=150,
        learning_rate=0.1,
        transfer_weight=1.0,
        consistency_weight=0.5,
        differences="unit",
        weight_decay=3e-3,
        preprocess="consistent",
        target_preprocess="encoder",
        initial="zero",
    ),
}


@dataclass(frozen=True)
class Progress:
    """What a step found, for a callback; losses are those before the step's update."""

    step: int
    steps: int
    learning_rate: float
    loss: Float[Tensor, " batch"]
    transfer: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]
    directions: Float[Tensor, "batch num_ws w_dim"]
    """After the step's update."""
    coefficients: Float[Tensor, "batch sources"]
    """After the step's update."""
    kept_directions: Float[Tensor, "batch num_ws w_dim"]
    """What would be returned if the run ended now."""


@dataclass(frozen=True)
class Optimized:
    """Directions and how they were reached, a row a target."""

    directions: Float[Tensor, "batch num_ws w_dim"]
    coefficients: Float[Tensor, "batch sources"]
    """Factor of the direction for each source; ones unless the recipe learns them."""
    loss: Float[Tensor, " batch"]
    transfer: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    """Steps taken, fewer than the recipe's where a target stopped early or failed."""
    failures: tuple[str | None, ...]
    """Why a target has no valid direction; None where it has one."""


def learning_rate(step: int, steps: int, highest: float) -> float:
    """The StyleGAN projector's: up for 0.5 % of the steps, cosine down over the last 75 %."""
    t = step / steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.75))
    return highest * down * min(1.0, t / 0.005)


def embed_chunks(
    generator: Generator,
    embedder: ImageEmbedder,
    ws: Float[Tensor, "images num_ws w_dim"],
    preprocess: Preprocess,
    max_images: int,
) -> Float[Tensor, "images embed"]:
    """Embeddings of rendered latents, at most `max_images` at a time.

    With gradients, several chunks are each rendered again in the backward pass, so memory holds
    one chunk whatever the number of images.
    """

    def embed(part: Tensor) -> Tensor:
        return embedder.embed_images(generator.synthesis(part), preprocess)

    chunks = ws.split(max_images)
    if len(chunks) == 1 or not ws.requires_grad:
        return torch.cat([embed(part) for part in chunks])
    return torch.cat([checkpoint(embed, part, use_reentrant=False) for part in chunks])


def random_latents(
    generator: Generator, seeds: Sequence[int], truncation: float = 0.7
) -> Float[Tensor, "batch num_ws w_dim"]:
    """One truncated latent for each seed; seeds alone decide, not their order or number."""
    z = torch.stack(
        [torch.randn(generator.z_dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    with torch.no_grad():
        return generator.mapping(z.to(generator.mean_w.device), truncation)


def draw_sources(
    bank: int, count: int, fresh: bool, draws: list[torch.Generator]
) -> Int[Tensor, "batch sources"]:
    """Which sources of the bank each target edits at this step."""
    if not fresh:
        return torch.arange(count).expand(len(draws), -1)
    return torch.stack([torch.randperm(bank, generator=draw)[:count] for draw in draws])


def step_coefficients(
    coefficients: Float[Tensor, "batch sources"], gradient: Float[Tensor, "batch sources"]
) -> Float[Tensor, "batch sources"]:
    """The first step of a new Adam, all that the released code's ever make: by the sign alone."""
    gradient = gradient + COEFFICIENT_DECAY * coefficients
    return coefficients - COEFFICIENT_RATE * gradient / (gradient.abs() + 1e-8)


def optimize_directions(
    generator: Generator,
    embedder: ImageEmbedder,
    target_embeddings: Float[Tensor, "batch embed"],
    source_ws: Float[Tensor, "bank num_ws w_dim"],
    recipe: Recipe,
    initial: Float[Tensor, "batch num_ws w_dim"],
    seeds: Sequence[int],
    on_step: Callable[[Progress], None] | None = None,
    max_images: int = 64,
) -> Optimized:
    """Find the direction that gives any source each target's essence (paper section 3).

    Minimises, for each target on its own, over the direction b,

        transfer_weight L_transfer + consistency_weight L_consistency,

    between the embeddings of G(w_i) and G(w_i + a_i b), with a_i = 1 but in the release recipe.

    Args:
        target_embeddings: raw or unit.
        source_ws: the bank of sources: their latents. Without `recipe.fresh_sources` its first
            `recipe.sources` are used. Each is rendered unedited once.
        initial: where the directions start. `recipe.initial` says what it should be.
        seeds: one a target: decides which fresh sources it meets.
        on_step: called after every step.
        max_images: images rendered at once; bounds memory.

    Raises:
        ValueError: shapes disagree, or the bank is smaller than `recipe.sources`.

    A target whose loss stops being finite ends there, named in `failures`; others go on.
    """
    batch = len(target_embeddings)
    if len(source_ws) < recipe.sources:
        raise ValueError(
            f"the recipe edits {recipe.sources} sources a step, found a bank of {len(source_ws)}"
        )
    expected = (batch, generator.num_ws, generator.w_dim)
    if initial.shape != expected or len(seeds) != batch:
        raise ValueError(
            f"expected {batch} seeds and initial directions of shape {list(expected)}, "
            f"found {len(seeds)} and {list(initial.shape)}"
        )
    device = initial.device
    count = recipe.sources
    bank = source_ws if recipe.fresh_sources else source_ws[:count]
    with torch.no_grad():
        bank_embeddings = embed_chunks(generator, embedder, bank, recipe.preprocess, max_images)

    # A tied direction is one vector, used by every layer.
    start = initial.mean(dim=1, keepdim=True) if recipe.tied_layers else initial
    vectors = start.detach().clone().requires_grad_(True)
    coefficients = initial.new_ones(batch, count).requires_grad_(recipe.coefficients)
    adam = torch.optim.Adam([vectors], weight_decay=recipe.weight_decay)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    active = torch.ones(batch, dtype=torch.bool, device=device)
    failures: list[str | None] = [None] * batch
    steps_taken = torch.zeros(batch, dtype=torch.int64, device=device)
    kept_vectors, kept_coefficients = vectors.detach().clone(), coefficients.detach().clone()
    kept_loss = initial.new_full((batch,), math.inf)
    kept_parts = initial.new_full((2, batch), math.inf)
    patience = Patience.new(batch, device)

    for step in range(recipe.steps):
        # Losses, of the targets that still run
        rows = active.nonzero()[:, 0]
        chosen = draw_sources(len(bank), count, recipe.fresh_sources, draws).to(device)[rows]
        edits = coefficients[rows, :, None, None] * vectors[rows, None]
        ws = (bank[chosen] + edits).flatten(0, 1)
        edited = embed_chunks(generator, embedder, ws, recipe.preprocess, max_images)
        edited = edited.unflatten(0, (len(rows), count))
        transfer = transfer_loss(edited, target_embeddings[rows])
        consistency = consistency_loss(bank_embeddings[chosen], edited, recipe.differences)
        loss = recipe.transfer_weight * transfer + recipe.consistency_weight * consistency

        # A sum, not a mean: the gradient of a row, and so what weight decay is to it, must not
        # depend on how many rows there are.
        leaves = [vectors, coefficients] if recipe.coefficients else [vectors]
        gradients = torch.autograd.grad(loss.sum(), leaves)
        finite = loss.isfinite() & gradients[0][rows].flatten(1).isfinite().all(dim=1)
        for row in rows[~finite].tolist():
            failures[row] = f"the loss of step {step} is not finite"
        active[rows[~finite]] = False

        # Update; rows that ended keep what they have
        rate = learning_rate(step, recipe.steps, recipe.learning_rate)
        adam.param_groups[0]["lr"] = rate
        before = vectors.detach().clone()
        vectors.grad = torch.where(active[:, None, None], gradients[0], 0)
        adam.step()
        with torch.no_grad():
            vectors[~active] = before[~active]
            if recipe.coefficients:
                stepped = step_coefficients(coefficients, gradients[1])
                coefficients[active] = stepped[active]
            steps_taken[active] += 1

            # The release keeps the updated direction of the lowest loss measured before an update.
            measured = torch.stack([loss, transfer, consistency]).to(initial.dtype)
            scattered = scatter_rows(measured, rows, batch)
            better = active & ((scattered[0] < kept_loss) | (recipe.keep == "last"))
            kept_vectors[better] = vectors[better]
            kept_coefficients[better] = coefficients[better]
            kept_loss = torch.where(better, scattered[0], kept_loss)
            kept_parts = torch.where(better, scattered[1:], kept_parts)

        if on_step is not None:
            on_step(
                Progress(
                    step,
                    recipe.steps,
                    rate,
                    loss=scattered[0],
                    transfer=scattered[1],
                    consistency=scattered[2],
                    directions=vectors.detach().expand(expected).clone(),
                    coefficients=coefficients.detach().clone(),
                    kept_directions=kept_vectors.expand(expected).clone(),
                )
            )  # fmt: skip
        if recipe.patience is not None:
            active &= ~patience.exhausted(scattered[0], recipe.patience)
        if not active.any():
            break

    return Optimized(
        directions=kept_vectors.expand(expected).clone(),
        coefficients=kept_coefficients,
        loss=kept_loss,
        transfer=kept_parts[0],
        consistency=kept_parts[1],
        steps=steps_taken,
        failures=tuple(failures),
    )


def scatter_rows(
    values: Float[Tensor, "kinds active"], rows: Int[Tensor, " active"], batch: int
) -> Float[Tensor, "kinds batch"]:
    """Values of the running targets at their places in the batch; NaN where a target has ended."""
    scattered = values.new_full((len(values), batch), math.nan)
    scattered[:, rows] = values.detach()
    return scattered


@dataclass
class Patience:
    """How long each target's loss has gone without improving, smoothed against fresh sources."""

    smooth: Float[Tensor, " batch"]
    lowest: Float[Tensor, " batch"]
    waited: Int[Tensor, " batch"]

    @staticmethod
    def new(batch: int, device: torch.device) -> "Patience":
        return Patience(
            torch.full((batch,), math.nan, device=device),
            torch.full((batch,), math.inf, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    def exhausted(self, loss: Float[Tensor, " batch"], patience: int) -> Bool[Tensor, " batch"]:
        """Take in a step's losses; true where nothing got better for `patience` steps."""
        self.smooth = torch.where(self.smooth.isnan(), loss, 0.9 * self.smooth + 0.1 * loss)
        improved = self.smooth < self.lowest - 1e-3
        self.lowest = torch.where(improved, self.smooth, self.lowest)
        self.waited = torch.where(improved, 0, self.waited + 1)
        return self.waited >= patience
