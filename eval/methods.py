"""Answer targets by the methods that are compared: mapper, optimizer, baselines and peers.

A method maps a bench, which holds everything methods may use, and a set of targets to edits. Knows
how edits are found; nothing of how they are scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from jaxtyping import Float, Float64
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.card import SUMS
from data.dataset import check_made_for, load_pairs
from data.illustrated.codes import draw_face, indices_from_z
from data.pairs import dimensions
from data.publish import sha256_of
from data.teacher import search_in_batches
from eval.sets import Directions, Embeddings, EvalSet, Sources
from eval.truth import Truth, with_essence
from predictor.correction import SourceCorrection, mixed_corrections
from predictor.folded import FoldedMapper
from predictor.mapper import Mapper, Prediction
from predictor.mapper_file import trained_recipe
from predictor.transfer import EssenceTransfer
from targetclip.command import Precision, in_precision
from targetclip.encoders.inverter import Inverter
from targetclip.losses import transfer_loss
from targetclip.optimize import draw_sources, learning_rate, losses_of
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import Scene
from targetclip.seeds import TEST_SOURCES, seed_of, source_seeds

Part = Literal[
    "mapper", "correction", "calibration", "pairs", "inverter", "differences", "encoder", "identity"
]
LACKING: dict[Part, str] = {
    "mapper": "there is no mapper (--mapper)",
    "correction": "the mapper has no correction for each source",
    "calibration": "the mapper is not calibrated (python -m eval.calibrate)",
    "pairs": "there are no pairs (--pairs)",
    "inverter": "the world has no inverter",
    "differences": "there is no mapper trained by differences (--differences)",
    "encoder": "there is no encoder (--encoder)",
    "identity": "the world has no identity model",
}

# Each source has a search of its own: no consistency, and fewer steps.
BLENDING = replace(RECIPES["consistent"], sources=1, steps=100, consistency_weight=0.0)
# As the teacher searches, but a direction for one source alone.
EACH_SOURCE = replace(RECIPES["identity"], sources=1, fresh_sources=False, consistency_weight=0.0)
# A network learns slower than a direction.
OWN_MAPPER = replace(RECIPES["identity"], steps=300, learning_rate=5e-3)
ROWS = 256  # directions of pairs in memory at once
PENALTIES = tuple(10.0**power for power in range(-7, 2))


# The teacher's pairs


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """Pairs of the train split, and what the baselines fit to them."""

    rows: datasets.Dataset = field(repr=False)
    """Their directions stay on disk."""
    embeddings: Float[Tensor, "pairs embed"]
    """Of length 1."""
    ids: frozenset[str]
    digest: str
    """Hash of the dataset."""
    centre: Float64[Tensor, " embed"]
    """Mean embedding."""
    mean: Float64[Tensor, "num_ws w_dim"]
    """Mean direction."""
    weights: Float64[Tensor, "embed entries"]
    """Ridge regression from embeddings less `centre` to flattened directions less `mean`."""

    def mean_directions(self, embeddings: Embeddings) -> Directions:
        """Return the mean of all training directions, for every target."""
        return self.mean.float().repeat(len(embeddings), 1, 1)

    def nearest_directions(self, embeddings: Embeddings) -> Directions:
        """Return the direction of the training pair whose embedding has the highest cosine."""
        nearest = (F.normalize(embeddings, dim=1) @ self.embeddings.T).argmax(dim=1)
        # One at a time: a selection of rows would lose their order and repetitions.
        return torch.stack([self.rows[int(i)]["direction"] for i in nearest])

    def ridge_directions(self, embeddings: Embeddings) -> Directions:
        """Return the predictions of the ridge regression."""
        offsets = F.normalize(embeddings.double(), dim=1) - self.centre
        directions = (self.mean.flatten() + offsets @ self.weights).float()
        return directions.reshape(-1, *self.mean.shape)


def ridge_by_penalty(
    offsets: Float64[Tensor, "pairs embed"], cross: Float64[Tensor, "embed entries"]
) -> list[Float64[Tensor, "embed entries"]]:
    """Return the weights of a ridge regression for each of PENALTIES.

    Args:
        offsets: centred inputs.
        cross: covariances of inputs and outputs.
    """
    variances, axes = torch.linalg.eigh(offsets.T @ offsets / len(offsets))
    projected = axes.T @ cross
    return [axes @ (projected / (variances[:, None] + penalty)) for penalty in PENALTIES]


def open_pair_table(folder: Path, scene: Scene) -> PairTable:
    """Read the train pairs of a dataset, a few at a time, and fit the ridge regression to them.

    Its penalty is that of the least squared error on the validation pairs.

    FileNotFoundError, ValueError: see `load_pairs` and `check_made_for`.
    """
    train, validation = load_pairs(folder, "train"), load_pairs(folder, "validation")
    check_made_for(folder, train.features, scene)
    embeddings = F.normalize(train["embedding"][:].double(), dim=1)
    centre = embeddings.mean(dim=0)
    offsets = embeddings - centre
    total, cross = torch.zeros(()), torch.zeros(())
    for start in range(0, len(train), ROWS):
        directions = train[start : start + ROWS]["direction"].double().flatten(1)
        total = total + directions.sum(dim=0)
        cross = cross + offsets[start : start + ROWS].T @ directions
    mean, candidates = total / len(train), ridge_by_penalty(offsets, cross / len(train))
    held_out = F.normalize(validation["embedding"][:].double(), dim=1) - centre
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for start in range(0, len(validation), ROWS):
        directions = validation[start : start + ROWS]["direction"].double().flatten(1)
        part = held_out[start : start + ROWS]
        for i, weights in enumerate(candidates):
            errors[i] += (mean + part @ weights - directions).square().sum()
    return PairTable(
        rows=train,
        embeddings=F.normalize(train["embedding"][:], dim=1),
        ids=frozenset(train["id"][:]),
        digest=sha256_of(folder / SUMS),
        centre=centre,
        mean=mean.unflatten(0, dimensions(train.features)[1:]),
        weights=candidates[int(errors.argmin())],
    )


# The bench


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything methods may use. Methods whose parts are missing are left out."""

    essence: EssenceTransfer
    """With the mapper that is judged."""
    sources: Sources
    """The test sources, for methods that edit each source by itself; others ignore them."""
    origin: int | str = TEST_SOURCES
    """Seed that they are generated from, or the hash of the file that they were read from."""
    pairs: PairTable | None = None
    differences: Mapper | None = None
    """A mapper trained by differences between samples alone."""
    encoder: Inverter | None = None
    """An inverter fine-tuned to return directions."""
    precision: Precision = "fp32"
    """Of searches; everything else is in float32."""
    max_steps: int | None = None
    """Cut every search to so many steps."""
    seed: int = 0
    recipe: str = "consistent"
    """Of the product's optimizer: the world's."""
    digests: Mapping[Part, str] = field(default_factory=dict)
    """Of the parts that are there: an answer is computed again where they change."""

    @property
    def scene(self) -> Scene:
        return self.essence.scene

    @property
    def generated(self) -> bool:
        """Whether the test sources are the generator's, and their faces known by the seed."""
        return self.origin == TEST_SOURCES

    def cut(self, recipe: Recipe) -> Recipe:
        """Return a recipe with `max_steps` at most."""
        most = self.max_steps
        return recipe if most is None else replace(recipe, steps=min(recipe.steps, most))

    def embed(self, targets: EvalSet, recipe: Recipe) -> Embeddings:
        """Return embeddings of targets, preprocessed for a recipe."""
        return self.scene.embed_targets(targets.pictures, recipe)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A method's edits for a set of targets."""

    edits: Float[Tensor, "targets *sources num_ws w_dim"]
    """A direction for each target, or an offset for each of the test sources."""
    correction: SourceCorrection | None = None
    """What is added to each direction for each source: see `stacked_corrections`."""
    notes: tuple[str, ...] = ()
    """A remark on each target; empty where there is none."""
    expected: Float[Tensor, " targets"] | None = None
    """Transfer scores that the method itself expects."""
    seconds: float = 0.0
    """For each target, from its picture to its edits; 0 until it is timed."""
    timing: Literal["alone", "share"] = "alone"
    """Of a target alone, or the share of a target where all were answered together."""

    def on(self, sources: Sources) -> Float[Tensor, "targets sources num_ws w_dim"]:
        """Return what is added to each source, which may be other ones than the test sources where
        edits are directions."""
        if self.edits.ndim == 4:
            return self.edits
        offsets = self.edits[:, None].expand(-1, len(sources), -1, -1)
        if self.correction is None:
            return offsets
        return offsets + self.correction.each(sources.to(offsets.device))


def stacked_corrections(corrections: Sequence[SourceCorrection | None]) -> SourceCorrection | None:
    """Return corrections of one target each as one of a row a target, zero for None; None where
    all are None."""
    some = next((one for one in corrections if one is not None), None)
    if some is None:
        return None
    nothing = replace(some, weights=torch.zeros_like(some.weights))
    rows = [nothing if one is None else one for one in corrections]
    return mixed_corrections(rows, [1.0] * len(rows))


# The mapper


def predict(scene: Scene, mapper: Mapper, pictures: Sequence[Image.Image]) -> Prediction:
    """Return a mapper's predictions for targets, preprocessed as those of its training."""
    embeddings = scene.embed_targets(pictures, trained_recipe(mapper.record))
    with torch.no_grad():
        prediction: Prediction = mapper(embeddings)
    return prediction


def mapped(
    scene: Scene,
    mapper: Mapper,
    pictures: Sequence[Image.Image],
    folded: FoldedMapper | None = None,
    keep: float | None = None,
) -> Answer:
    """Answer by a mapper, corrected for each source where it has a correction.

    Args:
        folded: its faster form, if that is there already.
        keep: place on the trade-off, of a mapper that reads one. None: its default.
    """
    embeddings = scene.embed_targets(pictures, trained_recipe(mapper.record))
    with torch.no_grad():
        prediction: Prediction = mapper(embeddings, keep)
    correction = None
    if mapper.correction is not None:
        folded = folded or FoldedMapper(mapper)
        correction = stacked_corrections([folded.correction(row[None], keep) for row in embeddings])
    return Answer(edits=prediction.directions, correction=correction, expected=prediction.expected)


def by_mapper(bench: Bench, targets: EvalSet) -> Answer:
    """Answer by the product's mapper."""
    essence = bench.essence
    return mapped(bench.scene, essence.asked_mapper(), targets.pictures, essence.folded)


def by_one_direction(bench: Bench, targets: EvalSet) -> Answer:
    """Answer by the directions of the product's mapper alone, without their corrections; its
    expected scores are not theirs."""
    prediction = predict(bench.scene, bench.essence.asked_mapper(), targets.pictures)
    return Answer(edits=prediction.directions)


def by_auto(bench: Bench, targets: EvalSet) -> Answer:
    """Answer as the product does by default, target by target; notes are `Direction.method`s."""
    recipe = bench.cut(RECIPES[bench.recipe])
    directions = [
        bench.essence.direction(picture, "auto", recipe, seed_of("compare", bench.seed, name))
        for picture, name in zip(targets.pictures, targets.ids, strict=True)
    ]
    return Answer(
        edits=torch.stack([direction.vector for direction in directions]),
        correction=stacked_corrections([direction.correction for direction in directions]),
        notes=tuple(direction.method for direction in directions),
    )


def by_differences(bench: Bench, targets: EvalSet) -> Answer:
    """Answer by a mapper trained as DeltaEdit: by differences of the generator's own samples."""
    if bench.differences is None:
        raise ValueError(LACKING["differences"])
    return mapped(bench.scene, bench.differences, targets.pictures)


# Optimizers


def taught(bench: Bench, targets: EvalSet, name: str) -> Answer:
    """Search by one of the teacher's recipes."""
    recipe = bench.cut(RECIPES[name])
    seeds = [seed_of("compare", bench.seed, target) for target in targets.ids]
    directions, failures = search_in_batches(
        bench.scene,
        bench.embed(targets, recipe),
        recipe,
        bench.scene.initial(targets.pictures, recipe.initial, seeds),
        seeds,
        label=name,
        precision=bench.precision,
    )
    return Answer(edits=directions, notes=tuple(f"failed: {f}" if f else "" for f in failures))


def blended(
    bench: Bench,
    ws: Float[Tensor, "images num_ws w_dim"],
    goals: Float[Tensor, "images embed"],
    recipe: Recipe,
) -> Float[Tensor, "images num_ws w_dim"]:
    """Optimize an offset of each latent on its own, towards the goal's embedding."""
    scene = bench.scene
    offsets = torch.zeros_like(ws).requires_grad_(True)
    adam = torch.optim.Adam([offsets], weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        with in_precision(scene.device, bench.precision):
            edited = scene.embedder.embed_images(scene.generator.synthesis(ws + offsets))
        loss = transfer_loss(edited[:, None], goals).sum()
        (offsets.grad,) = torch.autograd.grad(loss, [offsets])
        if not loss.isfinite():
            raise FloatingPointError(f"CLIP blending: the loss of step {step} is not finite")
        adam.param_groups[0]["lr"] = learning_rate(step, recipe.steps, recipe.learning_rate)
        adam.step()
    return offsets.detach()


def by_clip_blending(bench: Bench, targets: EvalSet, recipe: Recipe = BLENDING) -> Answer:
    """Optimize each source towards the mean of its own and the target's unit embedding.

    This is the paper's baseline.
    """
    scene, sources = bench.scene, bench.sources
    with torch.no_grad():
        unedited = F.normalize(scene.features(sources), dim=1)
    embeddings = F.normalize(bench.embed(targets, recipe), dim=1)
    goals = (unedited[None] + embeddings[:, None]).flatten(0, 1)
    ws = sources.repeat(len(targets), 1, 1)
    at_once = scene.at_once
    offsets = []
    for start in tqdm(range(0, len(ws), at_once), "clip-blending", unit="part", leave=False):
        part = slice(start, start + at_once)
        offsets.append(blended(bench, ws[part], goals[part], bench.cut(recipe)))
    return Answer(edits=torch.cat(offsets).unflatten(0, (len(targets), len(sources))))


def by_each_source(bench: Bench, targets: EvalSet, recipe: Recipe = EACH_SOURCE) -> Answer:
    """Search a direction for each source on its own: a teacher for edits that read their source.
    FloatingPointError: a search failed."""
    recipe, scene = bench.cut(recipe), bench.scene
    embeddings = bench.embed(targets, recipe)
    seeds = [seed_of("compare", bench.seed, target) for target in targets.ids]
    start = scene.initial(targets.pictures, recipe.initial, seeds)
    offsets = []
    for source in tqdm(bench.sources, "each source", unit="source", leave=False):
        with in_precision(scene.device, bench.precision):
            found = scene.search(embeddings, recipe, start, seeds, bank=source[None])
        if failures := [failure for failure in found.failures if failure is not None]:
            raise FloatingPointError(f"each source: {failures[0]}")
        offsets.append(found.directions)
    return Answer(edits=torch.stack(offsets, dim=1))


class LatentMapper(nn.Module):
    """What is added to sources for one target, as StyleCLIP's latent mapper gives it.

    The coarse, the middle and the fine layers of a latent have a network each, which reads them one
    at a time. A fresh one adds nothing.
    """

    def __init__(self, num_ws: int, w_dim: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.layers = [len(part) for part in torch.arange(num_ws).tensor_split([4, 8]) if len(part)]
        sizes = [w_dim, *[width] * depth]
        self.groups = nn.ModuleList()
        for _ in self.layers:
            hidden = [(nn.Linear(a, b), nn.LeakyReLU(0.2)) for a, b in pairwise(sizes)]
            last = nn.Linear(width, w_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.groups.append(nn.Sequential(*(part for pair in hidden for part in pair), last))

    def forward(
        self, ws: Float[Tensor, "sources num_ws w_dim"]
    ) -> Float[Tensor, "sources num_ws w_dim"]:
        normed = ws * (ws.square().mean(dim=-1, keepdim=True) + 1e-8).rsqrt()
        parts = normed.split(self.layers, dim=1)
        return torch.cat([net(part) for net, part in zip(self.groups, parts, strict=True)], dim=1)


def own_mapper(
    bench: Bench, embedding: Float[Tensor, "1 embed"], recipe: Recipe, seed: int
) -> LatentMapper:
    """Train a mapper for one target, by a recipe's losses on sources of the bank."""
    scene, bank = bench.scene, bench.scene.bank_of(recipe)
    before = bench.essence.source_features(recipe.preprocess, recipe.identity_weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = LatentMapper(*bank.shape[1:]).to(scene.device)
    draws = [torch.Generator().manual_seed(seed)]
    adam = torch.optim.Adam(mapper.parameters())
    for step in tqdm(range(recipe.steps), "own mapper", unit="step", leave=False):
        [chosen] = draw_sources(len(bank), recipe.sources, recipe.fresh_sources, draws)
        edits = mapper(bank[chosen])
        with in_precision(scene.device, bench.precision):
            after = scene.features(bank[chosen] + edits, recipe.preprocess, recipe.identity_weight)
        loss = losses_of(recipe, before[chosen][None], after[None], embedding).loss.sum()
        # As of a direction, which is decayed for each target
        loss = loss + recipe.weight_decay / 2 * edits.square().sum(dim=(1, 2)).mean()
        if not loss.isfinite():
            raise FloatingPointError(f"own mapper: the loss of step {step} is not finite")
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = learning_rate(step, recipe.steps, recipe.learning_rate)
        adam.step()
    return mapper


def by_own_mapper(bench: Bench, targets: EvalSet, recipe: Recipe = OWN_MAPPER) -> Answer:
    """Answer by a mapper for each target, trained for it alone, as StyleCLIP has one for each text.

    It reads the source; its edits are those of the test sources.
    """
    recipe = bench.cut(recipe)
    embeddings = bench.embed(targets, recipe)
    edits = []
    for name, embedding in zip(targets.ids, embeddings, strict=True):
        mapper = own_mapper(bench, embedding[None], recipe, seed_of("compare", bench.seed, name))
        with torch.no_grad():
            edits.append(mapper(bench.sources))
    return Answer(edits=torch.stack(edits))


# One pass, without a mapper


def by_pairs(
    bench: Bench, targets: EvalSet, answer: Callable[[PairTable, Tensor], Tensor]
) -> Answer:
    """Answer by a method of the table of pairs."""
    if bench.pairs is None:
        raise ValueError(LACKING["pairs"])
    embeddings = bench.embed(targets, RECIPES["consistent"])
    return Answer(edits=answer(bench.pairs, embeddings.cpu()).to(bench.sources.device))


def by_latent_blending(bench: Bench, targets: EvalSet) -> Answer:
    """Answer by the target's inversion less the mean latent, which adds all of the target."""
    return Answer(edits=bench.scene.invert(targets.pictures) - bench.scene.generator.mean_w)


def by_encoder(bench: Bench, targets: EvalSet) -> Answer:
    """Answer by an encoder of pictures, such as TargetCLIP-E: its output less its mean latent."""
    if bench.encoder is None:
        raise ValueError(LACKING["encoder"])
    with torch.no_grad():
        latents = bench.encoder(bench.scene.images_of(targets.pictures))
    return Answer(edits=latents - bench.encoder.mean_w)


# The upper reference


def right_answer(
    scene: Scene, truth: Truth, sources: Sources, seed: int = TEST_SOURCES
) -> Float[Tensor, "targets sources num_ws w_dim"]:
    """Return the offsets that take generated sources of a seed to their right edits.

    A right edit shows the source's own identity and the target's essence: it is drawn, inverted and
    so as good as inverter and generator can show it. No direction for all sources reaches it.
    """
    numbers = [torch.Generator().manual_seed(s) for s in source_seeds(seed, len(sources))]
    z = torch.stack([torch.randn(scene.generator.z_dim, generator=n) for n in numbers])
    faces = indices_from_z(z).tolist()
    edits = []
    for content in tqdm(truth.contents, "right answers", unit="target", leave=False):
        drawn = [draw_face(with_essence(face, content))[0] for face in faces]
        edits.append(scene.invert([Image.fromarray(picture) for picture in drawn]) - sources)
    return torch.stack(edits)


# All methods


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method and how it is run."""

    find: Callable[[Bench, EvalSet], Answer]
    needs: tuple[Part, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its own that decide its answers."""
    optimizes: bool = False
    """It searches: its seconds count, and precision and seed decide its answers."""
    slow: bool = False
    """It runs on the first few targets alone."""
    per_source: bool = False
    """Its edits are those of the test sources and of no others."""


def needs_of(method: Method, bench: Bench) -> tuple[Part, ...]:
    """Return the parts that a method needs.

    To refine the answers of a mapper that was trained by identity takes the identity model.
    """
    by_identity = "calibration" in method.needs and bench.essence.trained.identity_weight
    return (*method.needs, "identity") if by_identity else method.needs


def teacher(name: str, needs: tuple[Part, ...] = (), slow: bool = False) -> Method:
    """Return the method that searches by a recipe."""
    return Method(
        find=partial(taught, name=name),
        needs=needs,
        settings=asdict(RECIPES[name]),
        optimizes=True,
        slow=slow,
    )


def source_by_source(
    find: Callable[[Bench, EvalSet], Answer], recipe: Recipe, needs: tuple[Part, ...] = ()
) -> Method:
    """Return a method that searches by a recipe for the edit of each test source."""
    settings = asdict(recipe)
    return Method(
        find=find, needs=needs, settings=settings, optimizes=True, slow=True, per_source=True
    )


def baseline(answer: Callable[[PairTable, Tensor], Tensor], **settings: Any) -> Method:
    """Return a method of the table of pairs."""
    return Method(find=partial(by_pairs, answer=answer), needs=("pairs",), settings=settings)


METHODS: dict[str, Method] = {
    "mapper": Method(find=by_mapper, needs=("mapper",), settings={"corrected": True}),
    "one-direction": Method(find=by_one_direction, needs=("mapper", "correction")),
    "auto": Method(find=by_auto, needs=("mapper", "calibration"), optimizes=True),
    "consistent": teacher("consistent"),
    "identity": teacher("identity", ("identity",)),
    "release": teacher("release", ("inverter",), slow=True),
    "paper": teacher("paper", slow=True),
    "mean-direction": baseline(PairTable.mean_directions),
    "nearest-neighbour": baseline(PairTable.nearest_directions),
    "ridge": baseline(PairTable.ridge_directions, penalties=list(PENALTIES)),
    "latent-blending": Method(find=by_latent_blending, needs=("inverter",)),
    "clip-blending": source_by_source(by_clip_blending, BLENDING),
    "each-source": source_by_source(by_each_source, EACH_SOURCE, ("identity",)),
    "own-mapper": source_by_source(by_own_mapper, OWN_MAPPER, ("identity",)),
    "differences": Method(find=by_differences, needs=("differences",)),
    "encoder": Method(find=by_encoder, needs=("encoder",)),
}
