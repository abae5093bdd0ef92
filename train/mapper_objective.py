"""What the mapper is trained by and judged by: three terms, their stages, and a validation.

Knows losses and scores; nothing of optimizers, processes or files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from data.targets import Target, open_targets
from predictor.mapper import Mapper, Prediction
from targetclip.editing import render
from targetclip.encoders.identity import feature_model
from targetclip.losses import consistency_loss, identity_loss, transfer_loss
from targetclip.media.images import labelled_grid, tensor_to_pictures
from targetclip.optimize import draw_sources, embed_latents, losses_of
from targetclip.sources import generated_sources
from targetclip.scene import random_latents
from targetclip.seeds import seed_of
from train.mapper_data import Pairs, Scene

TERMS = ("transfer", "pairs", "differences")
STAGE = re.compile(r"([a-z]+(?:\+[a-z]+)*):([1-9][0-9]{0,8})")
POOL = 32  # fresh sources a batch; each target edits some of them
HELD_OUT = 16  # sources to validate on
HELD_OUT_SEED = 1
SHOWN = 8  # targets in the picture, of each kind, and sources + 1
IN_RANGE = ("drawn:", "generated:", "mixed:")  # what the bundled generator can show


# Stages


@dataclass(frozen=True)
class Stage:
    """So many steps by some of the terms."""

    terms: tuple[str, ...]
    steps: int


def parse_schedule(texts: Sequence[str], weights: Mapping[str, float]) -> tuple[Stage, ...]:
    """Stages written as NAME[+NAME...]:STEPS; terms of weight 0 are left out of them.

    Raises:
        ValueError: no stage, one that is not written so, unknown or repeated terms, or a stage
            of which nothing is left.
    """
    if not texts:
        raise ValueError("--schedule: expected stages such as pairs:1000 transfer:4000, found none")
    stages = []
    for text in texts:
        parts = STAGE.fullmatch(text)
        names = parts[1].split("+") if parts else []
        if not parts or not set(names) <= set(TERMS) or len(set(names)) < len(names):
            raise ValueError(
                f"--schedule: expected NAME[+NAME...]:STEPS with different names of "
                f"{', '.join(TERMS)} and 1 step or more, found {text!r}"
            )
        kept = tuple(name for name in TERMS if name in names and weights[name] > 0)
        if not kept:
            raise ValueError(f"--schedule: stage {text!r} has only terms of weight 0; leave it out")
        stages.append(Stage(kept, int(parts[2])))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage a step belongs to."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError(f"expected a step before the end, found one {step} after it")


# Terms


@dataclass(frozen=True)
class Draws:
    """How much of everything a batch holds, and how the terms add up."""

    weights: Mapping[str, float]
    noise: float
    """Expected length of the noise added to a unit embedding."""
    targets: int
    sources: int
    """Edited for each target."""
    pairs: int
    differences: int


def noisy(
    embeddings: Float[Tensor, "batch embed"], noise: float, random: torch.Generator
) -> Float[Tensor, "batch embed"]:
    """Unit embeddings moved by Gaussian noise and made unit again."""
    if noise == 0:
        return embeddings
    drawn = torch.randn(embeddings.shape, generator=random).to(embeddings.device)
    return F.normalize(embeddings + noise / embeddings.shape[1] ** 0.5 * drawn, dim=1)


class Objective(nn.Module):
    """The weighted loss of a batch, drawn from its own seed alone.

    The mapper is its only part with weights: the frozen networks and the data are not registered,
    so that a parallel wrapper neither sends nor waits for them.
    """

    def __init__(
        self,
        mapper: Mapper,
        scene: Scene,
        draws: Draws,
        targets: Float32[ndarray, "targets embed"] | None,
        pairs: Pairs | None,
    ) -> None:
        super().__init__()
        self.mapper = mapper
        self.scene = scene
        self.draws = draws
        self.targets = targets
        self.pairs_of_teacher = pairs

    def target_embeddings(self, random: torch.Generator) -> Float[Tensor, "batch embed"]:
        """Embeddings of random training targets: of the bank and of the pairs alike."""
        banked = 0 if self.targets is None else len(self.targets)
        pairs = self.pairs_of_teacher
        total = banked + (0 if pairs is None else len(pairs))
        chosen = torch.randint(total, (self.draws.targets,), generator=random)
        found = torch.empty(len(chosen), self.scene.embedder.embed_dim)
        if self.targets is not None:
            own = chosen < banked
            found[own] = torch.from_numpy(self.targets[chosen[own].numpy()])
        if pairs is not None:
            found[chosen >= banked] = pairs.embeddings[chosen[chosen >= banked] - banked]
        return found.to(self.scene.device)

    def transfer(self, random: torch.Generator, seed: int) -> dict[str, Tensor]:
        """The teacher's objective for random targets on fresh sources, through the generator."""
        scene, recipe, draws = self.scene, self.scene.recipe, self.draws
        targets = self.target_embeddings(random)
        prediction = self.mapper_in_full(noisy(targets, draws.noise, random))
        directions = prediction.directions
        count = max(POOL, draws.sources)
        seeds = [seed_of("mapper source", seed, i) for i in range(count)]
        pool = random_latents(scene.generator, seeds, scene.truncation)
        with torch.no_grad():
            before = scene.see_latents(pool)
        chosen = draw_sources(count, draws.sources, True, [random] * len(targets)).to(scene.device)
        seen = scene.see_latents((pool[chosen] + directions[:, None]).flatten(0, 1))
        losses = losses_of(recipe, before[chosen], seen.unflatten(0, chosen.shape), targets)
        loss = losses.loss + recipe.weight_decay / 2 * directions.square().sum(dim=(1, 2))
        reached = (1 - losses.transfer).detach()
        return {
            "transfer": loss.mean(),
            # The head's features are detached: it learns beside the direction, whatever its weight.
            "expected": (prediction.expected - reached).square().mean(),
        }

    def pairs(self, random: torch.Generator) -> dict[str, Tensor]:
        """Squared error of the teacher's directions, in units of their deviation."""
        pairs = self.pairs_of_teacher
        if pairs is None:
            raise ValueError("expected pairs for the term of that name, found none")
        chosen = torch.randint(len(pairs), (self.draws.pairs,), generator=random)
        embeddings = pairs.embeddings[chosen].to(self.scene.device)
        directions = self.mapper_in_full(noisy(embeddings, self.draws.noise, random)).directions
        error = (directions - pairs.directions(chosen).to(self.scene.device)) / self.mapper.scale
        return {"pairs": error.square().mean()}

    def differences(self, random: torch.Generator, seed: int) -> dict[str, Tensor]:
        """Squared error of the way from one random latent to another, read off their renderings."""
        scene, count = self.scene, self.draws.differences
        seeds = [seed_of("mapper latent", seed, i) for i in range(2 * count)]
        ws = random_latents(scene.generator, seeds, scene.truncation)
        with torch.no_grad():
            embeddings = F.normalize(scene.embed_latents(ws).float(), dim=1)
        first, second = noisy(embeddings, self.draws.noise, random).split(count)
        with torch.autocast(scene.device.type, enabled=False):
            found = self.mapper.directions_of_differences(second - first)
        error = (found - (ws[count:] - ws[:count])) / self.mapper.scale
        return {"differences": error.square().mean()}

    def mapper_in_full(self, embeddings: Float[Tensor, "batch embed"]) -> Prediction:
        """The mapper's answer in float32: it is a small part of a step, and what is learned."""
        with torch.autocast(self.scene.device.type, enabled=False):
            prediction: Prediction = self.mapper(embeddings)
        return prediction

    def forward(self, terms: Sequence[str], seed: int) -> dict[str, Tensor]:
        """`loss`, and each term before its weight, as means over the batch."""
        random = torch.Generator().manual_seed(seed)
        found: dict[str, Tensor] = {}
        if "transfer" in terms:
            found |= self.transfer(random, seed)
        if "pairs" in terms:
            found |= self.pairs(random)
        if "differences" in terms:
            found |= self.differences(random, seed)
        loss = sum((self.draws.weights.get(k, 1.0) * v for k, v in found.items()), torch.zeros(()))
        # Processes that average gradients wait for every parameter's, and only one term has the
        # score's.
        heads = (self.mapper.score, self.mapper.score_linear)
        loss = loss + 0 * sum(p.sum() for head in heads for p in head.parameters())
        return {"loss": loss, **found}


# Validation


@dataclass(frozen=True)
class Validation:
    """Targets and sources that nothing is trained on."""

    scene: Scene
    ids: frozenset[str]
    pictures: list[Image.Image]
    embeddings: Float[Tensor, "targets embed"]
    """What the mapper is given."""
    judged: Float[Tensor, "targets embed"]
    """What edits are compared with: preprocessed as the embedder itself does."""
    in_range: Bool[Tensor, " targets"]
    """Whether the generator can show such a picture."""
    sources: Float[Tensor, "sources num_ws w_dim"]

    @staticmethod
    def open(specs: Sequence[str], scene: Scene) -> "Validation":
        """Take up targets; pictures that cannot be read are left out.

        Raises:
            ValueError, FileNotFoundError, OSError: see `open_targets`; no good picture.
        """
        targets, in_range = [], []
        for spec in specs:
            for target in open_targets(spec, scene.generator, scene.truncation):
                if isinstance(target, Target):
                    targets.append(target)
                    in_range.append(spec.startswith(IN_RANGE))
        if not targets:
            raise ValueError(f"--validation: expected pictures, found none in {list(specs)}")
        pictures = [target.picture for target in targets]
        return Validation(
            scene,
            frozenset(target.id for target in targets),
            pictures,
            scene.embed_targets(pictures),
            scene.embedder.embed_pictures(pictures),
            torch.tensor(in_range),
            generated_sources(scene.generator, scene.truncation, HELD_OUT, HELD_OUT_SEED),
        )

    @torch.no_grad()
    def figures(self, mapper: Mapper) -> dict[str, float]:
        """Scores in full precision, means over targets."""
        scene = self.scene
        prediction = mapper(self.embeddings)

        seeing = feature_model(scene.embedder, scene.identity, float(scene.identity is not None))

        def see(ws: Tensor) -> Tensor:
            # As scores are always made, whatever the recipe's preprocessing.
            return embed_latents(scene.generator, seeing, ws, "consistent", scene.max_images)

        shape, embed = (len(self.pictures), len(self.sources)), scene.embedder.embed_dim
        edited = (self.sources[None] + prediction.directions[:, None]).flatten(0, 1)
        after = see(edited).unflatten(0, shape)
        before = see(self.sources).expand(len(after), -1, -1)
        transfer = 1 - transfer_loss(after[..., :embed], self.judged)
        consistency = 1 - consistency_loss(before[..., :embed], after[..., :embed], "unit")
        people: dict[str, Tensor] = {}
        if scene.identity is not None:
            people["identity_score"] = 1 - identity_loss(before[..., embed:], after[..., embed:])
        figures = people | {
            "transfer_score": transfer,
            "transfer_score_in_range": transfer[self.in_range.to(transfer.device)],
            "transfer_score_out_of_range": transfer[~self.in_range.to(transfer.device)],
            "consistency_score": consistency,
            "length": prediction.directions.flatten(1).norm(dim=1),
            "expected_error": (prediction.expected - transfer).abs(),
        }
        return {name: float(each.mean()) for name, each in figures.items() if len(each)}

    def grid(self, mapper: Mapper) -> Image.Image:
        """The sources, then a row a target: the target itself, and sources with its essence."""
        generator = self.scene.generator
        sources = self.sources[:SHOWN]
        unedited = tensor_to_pictures(render(generator, sources))
        rows = {"sources": [Image.new("RGB", unedited[0].size, "white"), *unedited]}
        kinds = [self.in_range.nonzero(), (~self.in_range).nonzero()]
        for i in [int(i) for kind in kinds for i in kind[:SHOWN]]:
            with torch.no_grad():
                direction = mapper(self.embeddings[i : i + 1]).directions[0]
            edited = tensor_to_pictures(render(generator, sources + direction))
            rows[f"target {i} and sources with its essence"] = [self.pictures[i], *edited]
        return labelled_grid(None, rows)
