"""The methods that are compared: the mapper, the teacher by its recipes, baselines and peers.

Each is a function of a bench, which holds everything a method may use, and of a set of targets; it
answers with edits. Knows how directions are found; nothing of how they are scored.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.drawn.faces import GROUPS, faces_from_z, to_images
from data.drawn.sketch import ESSENCE, Face, draw
from eval.pair_methods import PENALTIES, PairTable
from eval.sets import SOURCE_SEED, EvalSet, source_seeds
from predictor.mapper import Mapper
from predictor.mapper_file import trained_recipe
from predictor.transfer import EssenceTransfer
from targetclip.encoders.inverter import Inverter
from targetclip.losses import transfer_loss
from targetclip.media.images import picture_to_tensor
from targetclip.optimize import Progress, embed_latents, learning_rate, optimize_directions
from targetclip.precision import in_bfloat16
from targetclip.recipes import RECIPES, Recipe
from targetclip.sources import source_bank
from targetclip.seeds import BANK, seed_of
from targetclip.targets import embed_targets, initial_directions

Part = Literal["mapper", "calibration", "pairs", "inverter", "differences", "encoder", "identity"]
LACKING: dict[Part, str] = {
    "mapper": "there is no mapper (--mapper)",
    "calibration": "the mapper is not calibrated (python -m eval.calibrate)",
    "pairs": "there are no pairs (--pairs)",
    "inverter": "the world has no inverter",
    "differences": "there is no mapper trained by differences (--differences)",
    "encoder": "there is no encoder (--encoder)",
    "identity": "the world has no identity model",
}

# Each source alone: there is no other to agree with. Fewer steps, since there are more searches.
BLENDING = replace(RECIPES["consistent"], sources=1, steps=100, consistency_weight=0.0)


@dataclass(frozen=True)
class Bench:
    """What methods may use. A part that is not there leaves the methods out that need it."""

    essence: EssenceTransfer
    """With the mapper that is judged."""
    sources: Float[Tensor, "sources num_ws w_dim"]
    """The test sources. Methods that answer for each source alone may see them; no other does."""
    pairs: PairTable | None = None
    differences: Mapper | None = None
    """A mapper trained by differences between samples alone."""
    encoder: Inverter | None = None
    """An inverter fine-tuned to answer with directions."""
    half: bool = False
    """Whether optimizers compute in bfloat16."""
    max_steps: int | None = None
    """Cut every optimization to so many steps."""
    seed: int = 0
    recipe: str = "consistent"
    """Of the product's optimizer: the world's."""
    digests: Mapping[Part, str] = field(default_factory=dict)
    """Of the parts that are there: what a change of them is known by."""

    def cut(self, recipe: Recipe) -> Recipe:
        """A recipe in `max_steps` at most."""
        most = self.max_steps
        return recipe if most is None else replace(recipe, steps=min(recipe.steps, most))

    def precision(self) -> AbstractContextManager[Any]:
        """Of optimizers; everything else is in float32."""
        return in_bfloat16(self.sources.device) if self.half else nullcontext()

    def embed(self, targets: EvalSet, recipe: Recipe) -> Float[Tensor, "targets embed"]:
        """Embeddings of targets, preprocessed as a recipe wants them."""
        essence, pictures = self.essence, list(targets.pictures)
        return embed_targets(essence.generator, essence.embedder, pictures, recipe)


@dataclass(frozen=True)
class Answer:
    """What a method says of a set of targets."""

    edits: Float[Tensor, "targets *sources num_ws w_dim"]
    """A direction for each target, or an offset for each of its sources."""
    notes: tuple[str, ...] = ()
    """A word on each target; empty where there is nothing to say."""
    expected: Float[Tensor, " targets"] | None = None
    """Transfer score the method itself expects."""


Find = Callable[[Bench, EvalSet], Answer]


# The mapper


def mapped(bench: Bench, targets: EvalSet, mapper: Mapper) -> Answer:
    """A mapper's answers, in one pass."""
    embeddings = bench.embed(targets, trained_recipe(mapper.record))
    with torch.no_grad():
        prediction = mapper(embeddings)
    return Answer(prediction.directions, expected=prediction.expected)


def by_mapper(bench: Bench, targets: EvalSet) -> Answer:
    return mapped(bench, targets, bench.essence.asked_mapper())


def by_auto(bench: Bench, targets: EvalSet) -> Answer:
    """As the product answers by default, one target after another; notes say by what."""
    recipe = bench.cut(RECIPES[bench.recipe])
    found = [
        bench.essence.direction(picture, "auto", recipe, seed_of("compare", bench.seed, name))
        for picture, name in zip(targets.pictures, targets.ids, strict=True)
    ]
    vectors = torch.stack([direction.vector for direction in found])
    return Answer(vectors, tuple(direction.method for direction in found))


def by_differences(bench: Bench, targets: EvalSet) -> Answer:
    """As DeltaEdit is trained: by differences of the generator's own samples, never by targets."""
    if bench.differences is None:
        raise ValueError(LACKING["differences"])
    return mapped(bench, targets, bench.differences)


# Optimizers


def step_bar(recipe: Recipe, name: str, done: int, total: int) -> tqdm:
    return tqdm(total=recipe.steps, desc=f"{name}, {done} of {total}", unit="step", leave=False)


def taught(bench: Bench, targets: EvalSet, name: str) -> Answer:
    """The teacher by one of its recipes, as many targets at once as `max_images` lets."""
    essence, recipe = bench.essence, bench.cut(RECIPES[name])
    generator, embeddings = essence.generator, bench.embed(targets, recipe)
    seeds = [seed_of("compare", bench.seed, name) for name in targets.ids]
    pictures = list(targets.pictures)
    initial = initial_directions(generator, essence.inverter, pictures, recipe.initial, seeds)
    count = BANK if recipe.fresh_sources else recipe.sources
    bank = source_bank(generator, essence.truncation, count)
    at_once = max(1, essence.max_images // recipe.sources)
    directions, notes = [], []
    for start in range(0, len(targets), at_once):
        span = slice(start, start + at_once)
        with step_bar(recipe, name, start, len(targets)) as bar, bench.precision():

            def on_step(progress: Progress, bar: tqdm = bar) -> None:
                bar.update()

            found = optimize_directions(
                generator,
                essence.embedder,
                embeddings[span],
                bank,
                recipe,
                initial[span],
                seeds[span],
                on_step,
                essence.max_images,
                identity=essence.identity,
            )
        directions.append(found.directions)
        notes += [f"failed: {reason}" if reason else "" for reason in found.failures]
    return Answer(torch.cat(directions), tuple(notes))


def blended(
    bench: Bench, ws: Float[Tensor, "images num_ws w_dim"], goals: Float[Tensor, "images embed"]
) -> Float[Tensor, "images num_ws w_dim"]:
    """Offsets of latents, each optimized on its own towards its goal's embedding."""
    essence, recipe = bench.essence, bench.cut(BLENDING)
    offsets = torch.zeros_like(ws).requires_grad_(True)
    adam = torch.optim.Adam([offsets], weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        with bench.precision():
            images = essence.generator.synthesis(ws + offsets)
            edited = essence.embedder.embed_images(images)
        loss = transfer_loss(edited[:, None], goals).sum()
        (offsets.grad,) = torch.autograd.grad(loss, [offsets])
        if not loss.isfinite():
            raise FloatingPointError(f"CLIP blending: the loss of step {step} is not finite")
        adam.param_groups[0]["lr"] = learning_rate(step, recipe.steps, recipe.learning_rate)
        adam.step()
    return offsets.detach()


def by_clip_blending(bench: Bench, targets: EvalSet) -> Answer:
    """Every source on its own towards the mean of its own and the target's unit embedding.

    The paper's own baseline. Its settings are BLENDING.
    """
    essence, sources = bench.essence, bench.sources
    with torch.no_grad():
        found = embed_latents(
            essence.generator, essence.embedder, sources, "consistent", essence.max_images
        )
    judged = F.normalize(bench.embed(targets, RECIPES["consistent"]), dim=1)
    goals = (F.normalize(found, dim=1)[None] + judged[:, None]).flatten(0, 1)
    ws = sources.repeat(len(targets), 1, 1)
    parts = zip(ws.split(essence.max_images), goals.split(essence.max_images), strict=True)
    total = -(-len(ws) // essence.max_images)
    bar = tqdm(parts, "clip-blending", total=total, unit="part", leave=False)
    offsets = torch.cat([blended(bench, *part) for part in bar])
    return Answer(offsets.unflatten(0, (len(targets), len(sources))))


# One pass, without a mapper


def by_mean_direction(bench: Bench, targets: EvalSet) -> Answer:
    return by_pairs(bench, targets, PairTable.mean_directions)


def by_nearest_neighbour(bench: Bench, targets: EvalSet) -> Answer:
    return by_pairs(bench, targets, PairTable.nearest_directions)


def by_ridge(bench: Bench, targets: EvalSet) -> Answer:
    return by_pairs(bench, targets, PairTable.ridge_directions)


def by_pairs(
    bench: Bench, targets: EvalSet, answer: Callable[[PairTable, Tensor], Tensor]
) -> Answer:
    """What a baseline makes of the teacher's pairs."""
    if bench.pairs is None:
        raise ValueError(LACKING["pairs"])
    embeddings = bench.embed(targets, RECIPES["consistent"])
    return Answer(answer(bench.pairs, embeddings.cpu()).to(bench.sources.device))


def by_latent_blending(bench: Bench, targets: EvalSet) -> Answer:
    """The target's inversion less the mean latent: everything of the target, added to a source."""
    inverted = bench.essence.invert(list(targets.pictures))
    return Answer(inverted - bench.essence.generator.mean_w)


def by_encoder(bench: Bench, targets: EvalSet) -> Answer:
    """An encoder of target pictures, as TargetCLIP-E is one: its answer less its mean latent."""
    encoder = bench.encoder
    if encoder is None:
        raise ValueError(LACKING["encoder"])
    size = bench.essence.generator.resolution
    images = torch.cat([picture_to_tensor(picture, size) for picture in targets.pictures])
    with torch.no_grad():
        return Answer(encoder(images.to(bench.sources.device)) - encoder.mean_w)


# The upper reference


def drawn_answer(
    targets: Sequence[Face], z_dim: int, count: int, seed: int = SOURCE_SEED
) -> tuple[Float[Tensor, "sources 3 64 64"], Float[Tensor, "targets sources 3 64 64"]]:
    """The right answer, which no direction can reach: images of sources and of their edits.

    The faces of generated sources of a seed, drawn, and drawn anew with their own identity and a
    target's essence; of its extras and style nothing.
    """
    z = torch.stack(
        [
            torch.randn(z_dim, generator=torch.Generator().manual_seed(seed))
            for seed in source_seeds(seed, count)
        ]
    )
    values = faces_from_z(z[:, None].expand(-1, len(GROUPS), -1)).tolist()
    faces = [Face(*row) for row in values]
    before = np.stack([np.asarray(draw(face)) for face in faces])
    edited = []
    for target in targets:
        essence = {name: getattr(target, name) for name in ESSENCE}
        pictures = [np.asarray(draw(replace(face, **essence))) for face in faces]
        edited.append(to_images(np.stack(pictures)))
    return to_images(before), torch.stack(edited)


# What is compared


@dataclass(frozen=True)
class Method:
    """A method and how it is run."""

    find: Find
    needs: tuple[Part, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What its answers depend on, beside the bench."""
    optimizes: bool = False
    """It searches, so that its seconds count and a change of precision or seed changes it."""
    slow: bool = False
    """It runs on the first few targets alone."""
    per_source: bool = False
    """Its edits are those of the test sources and of no others."""


def needs_of(method: Method, bench: Bench) -> tuple[Part, ...]:
    """Parts that a method needs; the mapper's refinements, the model of who it was taught to
    keep."""
    taught = "calibration" in method.needs and bench.essence.trained.identity_weight
    return (*method.needs, "identity") if taught else method.needs


METHODS: dict[str, Method] = {
    "mapper": Method(by_mapper, ("mapper",)),
    "auto": Method(by_auto, ("mapper", "calibration"), optimizes=True),
    "consistent": Method(
        partial(taught, name="consistent"),
        settings=asdict(RECIPES["consistent"]),
        optimizes=True,
    ),
    "identity": Method(
        partial(taught, name="identity"),
        ("identity",),
        asdict(RECIPES["identity"]),
        optimizes=True,
    ),
    "release": Method(
        partial(taught, name="release"),
        ("inverter",),
        asdict(RECIPES["release"]),
        optimizes=True,
        slow=True,
    ),
    "paper": Method(
        partial(taught, name="paper"), (), asdict(RECIPES["paper"]), optimizes=True, slow=True
    ),
    "mean-direction": Method(by_mean_direction, ("pairs",)),
    "nearest-neighbour": Method(by_nearest_neighbour, ("pairs",)),
    "ridge": Method(by_ridge, ("pairs",), {"penalties": list(PENALTIES)}),
    "latent-blending": Method(by_latent_blending, ("inverter",)),
    "clip-blending": Method(
        by_clip_blending, (), asdict(BLENDING), optimizes=True, slow=True, per_source=True
    ),
    "differences": Method(by_differences, ("differences",)),
    "encoder": Method(by_encoder, ("encoder",)),
}
