"""The optimizer (teacher): find directions in W+ for many targets at once (paper, section 3).

Knows the method; nothing of files, launchers or printing. Rows of a batch are independent: a batch
of targets gives the same directions as each target alone.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from targetclip.embedder import ImageEmbedder, embed_latents
from targetclip.encoders.identity import IdentityModel, feature_model
from targetclip.generators import Generator
from targetclip.graphs import Replayed
from targetclip.losses import consistency_loss, identity_loss, transfer_loss
from targetclip.recipes import Recipe

COEFFICIENT_RATE = 0.2  # the release steps its coefficients at this rate, whatever the schedule
COEFFICIENT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state after a step, for a callback. Losses were measured before the step's update."""

    step: int
    steps: int
    learning_rate: float
    loss: Float[Tensor, " batch"]
    transfer: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]
    directions: Float[Tensor, "batch num_ws w_dim"]
    coefficients: Float[Tensor, "batch sources"]
    kept: "Optimized"
    """What would be returned if the search ended now."""
    snapshot: Callable[[], dict[str, Any]]
    """Return a copy of the whole state, for `resume`."""


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """Directions, their losses and how long they took: a row for each target."""

    directions: Float[Tensor, "batch num_ws w_dim"]
    coefficients: Float[Tensor, "batch sources"]
    """Factor of the direction for each source; 1 unless the recipe learns them."""
    loss: Float[Tensor, " batch"]
    transfer: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    """Steps taken, fewer than the recipe's where a target stopped early or failed."""
    failures: tuple[str | None, ...]
    """Why a target has no valid direction; None where it has one."""


@dataclass(frozen=True)
class Losses:
    """The loss of a recipe, and its parts before their weights."""

    loss: Float[Tensor, " batch"]
    transfer: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]


def losses_of(
    recipe: Recipe,
    before: Float[Tensor, "batch sources _"],
    after: Float[Tensor, "batch sources _"],
    targets: Float[Tensor, "batch embed"],
    identity_weights: Float[Tensor, " batch"] | None = None,
) -> Losses:
    """Return a recipe's losses from the features of sources before and after their edits:
    embeddings, followed by identity features where identity has a weight.

    Args:
        identity_weights: of the identity loss, one for each target. None: the recipe's, for all.

    Raises:
        ValueError: `before` and `after` differ in size.
    """
    embed = targets.shape[1]
    if before.shape != after.shape:
        raise ValueError(
            f"expected features of one size before and after, found {before.shape[-1]} and "
            f"{after.shape[-1]}: embeddings have {embed}, identity features follow where the "
            "recipe has an identity weight"
        )
    transfer = transfer_loss(after[..., :embed], targets)
    consistency = consistency_loss(before[..., :embed], after[..., :embed], recipe.differences)
    loss = recipe.transfer_weight * transfer + recipe.consistency_weight * consistency
    if identity_weights is not None or recipe.identity_weight:
        people = identity_loss(before[..., embed:], after[..., embed:])
        weight = recipe.identity_weight if identity_weights is None else identity_weights
        loss = loss + weight * people
    return Losses(loss, transfer, consistency)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the rate of a step, as StyleGAN's projector has it: a linear rise over 0.5 % of the
    steps, a cosine fall over the last 75 %."""
    t = step / steps
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - t) / 0.75))
    return highest * down * min(1.0, t / 0.005)


def draw_sources(
    bank: int, count: int, fresh: bool, draws: list[torch.Generator]
) -> Int[Tensor, "batch sources"]:
    """Return the indices of the bank's sources that each target edits at this step."""
    if not fresh:
        return torch.arange(count).expand(len(draws), -1)
    return torch.stack([torch.randperm(bank, generator=draw)[:count] for draw in draws])


def step_coefficients(
    coefficients: Float[Tensor, "batch sources"], gradient: Float[Tensor, "batch sources"]
) -> Float[Tensor, "batch sources"]:
    """Return coefficients after the first step of a new Adam, which is what the released code takes
    at every step: it moves by the sign of the gradient."""
    gradient = gradient + COEFFICIENT_DECAY * coefficients
    return coefficients - COEFFICIENT_RATE * gradient / (gradient.abs() + 1e-8)


@dataclass
class Patience:
    """Number of steps in which each target's smoothed loss has not improved."""

    smooth: Float[Tensor, " batch"]
    lowest: Float[Tensor, " batch"]
    waited: Int[Tensor, " batch"]

    def exhausted(self, loss: Float[Tensor, " batch"], patience: int) -> Bool[Tensor, " batch"]:
        """Add a step's losses; return true where nothing improved for `patience` steps."""
        self.smooth = torch.where(self.smooth.isnan(), loss, 0.9 * self.smooth + 0.1 * loss)
        improved = self.smooth < self.lowest - 1e-3
        self.lowest = torch.where(improved, self.smooth, self.lowest)
        self.waited = torch.where(improved, 0, self.waited + 1)
        return self.waited >= patience


@dataclass
class Search:
    """The state of a search: everything that changes from step to step, a row for each target."""

    step: int
    """Number of the next step."""
    vectors: Float[Tensor, "batch layers w_dim"]
    """The directions; a single layer where the recipe ties layers."""
    coefficients: Float[Tensor, "batch sources"]
    adam: torch.optim.Adam
    draws: list[torch.Generator]
    active: Bool[Tensor, " batch"]
    failures: list[str | None]
    steps_taken: Int[Tensor, " batch"]
    kept_vectors: Float[Tensor, "batch layers w_dim"]
    kept_coefficients: Float[Tensor, "batch sources"]
    kept_losses: Float[Tensor, "kinds batch"]
    """Loss, transfer loss and consistency loss of the kept directions."""
    patience: Patience

    @staticmethod
    def new(
        recipe: Recipe, initial: Float[Tensor, "batch num_ws w_dim"], seeds: Sequence[int]
    ) -> "Search":
        batch = len(initial)
        # A tied direction is one vector, used by every layer.
        start = initial.mean(dim=1, keepdim=True) if recipe.tied_layers else initial
        vectors = start.detach().clone().requires_grad_(True)
        coefficients = initial.new_ones(batch, recipe.sources)
        none = torch.zeros(batch, dtype=torch.int64, device=initial.device)
        smooth, lowest = (torch.full((batch,), x).to(none.device) for x in (math.nan, math.inf))
        return Search(
            step=0,
            vectors=vectors,
            coefficients=coefficients.requires_grad_(recipe.coefficients),
            adam=torch.optim.Adam([vectors], weight_decay=recipe.weight_decay),
            draws=[torch.Generator().manual_seed(seed) for seed in seeds],
            active=torch.ones(batch, dtype=torch.bool, device=initial.device),
            failures=[None] * batch,
            steps_taken=none,
            kept_vectors=vectors.detach().clone(),
            kept_coefficients=coefficients.detach().clone(),
            kept_losses=initial.new_full((3, batch), math.inf),
            patience=Patience(smooth, lowest, none.clone()),
        )

    def kept(self, num_ws: int) -> Optimized:
        """Return a copy of the kept directions, of so many layers."""
        return Optimized(
            directions=self.kept_vectors.expand(-1, num_ws, -1).clone(),
            coefficients=self.kept_coefficients.clone(),
            loss=self.kept_losses[0].clone(),
            transfer=self.kept_losses[1].clone(),
            consistency=self.kept_losses[2].clone(),
            steps=self.steps_taken.clone(),
            failures=tuple(self.failures),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor but those of Adam by its name, without copying."""
        named = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return named | {f"patience.{name}": value for name, value in vars(self.patience).items()}

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state that `torch.load(weights_only=True)` can read."""
        return {
            "step": self.step,
            "failures": list(self.failures),
            "adam": copy.deepcopy(self.adam.state_dict()),
            "draws": [draw.get_state() for draw in self.draws],
            "tensors": {name: value.detach().clone() for name, value in self.tensors().items()},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Continue from a snapshot of the same recipe and targets, to the same bits.
        ValueError: the snapshot has other shapes."""
        saved, tensors = snapshot["tensors"], self.tensors()
        shapes = {name: list(value.shape) for name, value in saved.items()}
        expected = {name: list(value.shape) for name, value in tensors.items()}
        if shapes != expected:
            raise ValueError(
                f"a snapshot of other targets or of another recipe: expected {expected}, "
                f"found {shapes}"
            )
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(saved[name])
        self.adam.load_state_dict(snapshot["adam"])
        for draw, state in zip(self.draws, snapshot["draws"], strict=True):
            draw.set_state(state)
        self.step, self.failures = snapshot["step"], list(snapshot["failures"])

    def update(
        self,
        recipe: Recipe,
        rate: float,
        gradients: Sequence[Tensor],
        losses: Float[Tensor, "kinds batch"],
    ) -> None:
        """Take one step of Adam by gradients of all rows; those that have ended do not change."""
        finite = losses[0].isfinite() & gradients[0].flatten(1).isfinite().all(dim=1)
        for row in (self.active & ~finite).nonzero()[:, 0].tolist():
            self.failures[row] = f"the loss of step {self.step} is not finite"
        self.active &= finite
        active = self.active[:, None]
        self.adam.param_groups[0]["lr"] = rate
        before = self.vectors.detach().clone()
        self.vectors.grad = torch.where(active[..., None], gradients[0], 0)
        self.adam.step()
        with torch.no_grad():
            self.vectors.copy_(torch.where(active[..., None], self.vectors, before))
            if recipe.coefficients:
                stepped = step_coefficients(self.coefficients, gradients[1])
                self.coefficients.copy_(torch.where(active, stepped, self.coefficients))
            self.steps_taken += self.active

            # The release keeps the direction after the update whose loss before it was lowest.
            better = self.active & ((losses[0] < self.kept_losses[0]) | (recipe.keep == "last"))
            for kept, new, rows in (
                (self.kept_vectors, self.vectors, better[:, None, None]),
                (self.kept_coefficients, self.coefficients, better[:, None]),
                (self.kept_losses, losses, better),
            ):
                kept.copy_(torch.where(rows, new, kept))
            if recipe.patience is not None:
                self.active &= ~self.patience.exhausted(losses[0], recipe.patience)
        self.step += 1


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
    resume: Mapping[str, Any] | None = None,
    bank_features: Float[Tensor, "_ features"] | None = None,
    identity: IdentityModel | None = None,
    held: Float[Tensor, "_ _ num_ws w_dim"] | None = None,
    graphs: bool = True,
) -> Optimized:
    """Find the direction that gives any source each target's essence (paper, section 3).

    For each target on its own, minimise over the direction b

        transfer_weight L_transfer + consistency_weight L_consistency + identity_weight L_identity

    between the images G(w_i) and G(w_i + a_i b) of sources w_i. The factors a_i are 1 except in the
    release recipe; the identity weight is 0 in the paper's recipes. A target whose loss becomes
    NaN or infinite ends there and is named in `failures`; the others go on.

    Args:
        target_embeddings: raw or unit.
        source_ws: latents of the bank. Without `recipe.fresh_sources` its first `recipe.sources`
            are used.
        initial: where the directions start; `recipe.initial` says what it should be.
        seeds: one for each target: decides which fresh sources it edits.
        on_step: called after every step.
        max_images: images rendered at once; bounds memory.
        resume: `Progress.snapshot()` of an earlier run with the same arguments. The search goes on
            after it, to the same bits as one that was never stopped.
        bank_features: features of the unedited bank, by the recipe's `feature_model`, preprocessing
            and `render_size`, to share between searches. None: computed here.
        identity: the model of the identity loss.
        held: [batch, bank, num_ws, w_dim]: what is added to each source beside the direction, and
            is not searched for: the images are then G(w_i) and G(w_i + h_i + a_i b).
        graphs: on CUDA devices, replay a step as one graph; see `targetclip.graphs`. Only where
            all images of a step are rendered at once.

    Raises:
        ValueError: shapes disagree, the bank is smaller than `recipe.sources`, or the recipe has an
            identity weight and there is no identity model.
    """
    batch, count = len(target_embeddings), recipe.sources
    if len(source_ws) < count:
        raise ValueError(
            f"the recipe edits {count} sources a step, found a bank of {len(source_ws)}"
        )
    if len(seeds) != batch or initial.shape != (batch, generator.num_ws, generator.w_dim):
        raise ValueError(
            f"expected {batch} seeds and initial directions [{batch}, {generator.num_ws}, "
            f"{generator.w_dim}], found {len(seeds)} and {list(initial.shape)}"
        )
    if held is not None and held.shape != (batch, *source_ws.shape):
        raise ValueError(
            f"expected held offsets {[batch, *source_ws.shape]}, one for each target and source, "
            f"found {list(held.shape)}"
        )
    bank = source_ws if recipe.fresh_sources else source_ws[:count]
    model = feature_model(embedder, identity, recipe.identity_weight)
    rendering = recipe.preprocess, max_images, recipe.render_size
    if bank_features is None:
        with torch.no_grad():
            before = embed_latents(generator, model, bank, *rendering)
    elif len(bank_features) != len(source_ws):
        raise ValueError(
            f"expected features of the bank's {len(source_ws)} sources, found {len(bank_features)}"
        )
    else:
        before = bank_features[: len(bank)]
    search = Search.new(recipe, initial, seeds)
    if resume is not None:
        search.restore(resume)

    def measure(
        vectors: Tensor, coefficients: Tensor, sources: Tensor, before: Tensor, targets: Tensor
    ) -> tuple[Tensor, ...]:
        """Return losses [kinds, rows] and their gradients in vectors and, if they are learned, in
        coefficients."""
        leaves = [each.detach().requires_grad_(True) for each in (vectors, coefficients)]
        ws = sources + leaves[1][:, :, None, None] * leaves[0][:, None]
        after = embed_latents(generator, model, ws.flatten(0, 1), *rendering)
        parts = losses_of(recipe, before, after.unflatten(0, ws.shape[:2]), targets)
        # A sum, not a mean: the gradient of a row, compared with its weight decay, must not depend
        # on the number of rows.
        found = torch.autograd.grad(parts.loss.sum(), leaves[: 1 + recipe.coefficients])
        measured = torch.stack([parts.loss, parts.transfer, parts.consistency])
        return measured.detach().to(initial.dtype), *found

    # Several chunks would be rendered again in the backward pass, which no graph can hold.
    replayed = Replayed(measure, capture=graphs and batch * count <= max_images)
    while search.step < recipe.steps and search.active.any():
        # Losses of the active targets
        rows = search.active.nonzero()[:, 0]
        chosen = draw_sources(len(bank), count, recipe.fresh_sources, search.draws)
        chosen = chosen.to(initial.device)[rows]
        sources = bank[chosen] if held is None else bank[chosen] + held[rows[:, None], chosen]
        vectors, coefficients = search.vectors.detach()[rows], search.coefficients.detach()[rows]
        measured, *found = replayed(
            vectors, coefficients, sources, before[chosen], target_embeddings[rows]
        )
        losses = initial.new_full((3, batch), math.nan)  # NaN where a target has ended
        losses[:, rows] = measured
        gradients = [
            each.new_zeros(batch, *each.shape[1:]).index_copy_(0, rows, each) for each in found
        ]
        rate = learning_rate(search.step, recipe.steps, recipe.learning_rate)
        search.update(recipe, rate, gradients, losses)

        if on_step is not None:
            on_step(
                Progress(
                    step=search.step - 1,
                    steps=recipe.steps,
                    learning_rate=rate,
                    loss=losses[0],
                    transfer=losses[1],
                    consistency=losses[2],
                    directions=search.vectors.detach().expand(initial.shape).clone(),
                    coefficients=search.coefficients.detach().clone(),
                    kept=search.kept(generator.num_ws),
                    snapshot=search.snapshot,
                )
            )

    return search.kept(generator.num_ws)
