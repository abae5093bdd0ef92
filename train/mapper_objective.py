"""The losses that train the mapper, and the stages in which they follow each other.

Knows losses of batches; nothing of optimizers, processes or files. Three terms:

- transfer: the optimizer's own objective for the mapper's directions and their corrections,
  through the generator;
- pairs: the squared distance of directions to those that the optimizer found;
- differences: the squared distance of directions to the difference of two random latents, given the
  difference of the embeddings of their renderings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.mapper import Mapper, Prediction
from predictor.tradeoff import MIDDLE, Keep
from targetclip.command import did_you_mean
from targetclip.losses import transfer_loss
from targetclip.optimize import draw_sources, losses_of
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.seeds import seed_of
from train.mapper_data import BatchSizes, Pairs, SourceReading, training_sources

TERMS = ("transfer", "pairs", "differences")
STAGE = re.compile(r"([a-z]+(?:\+[a-z]+)*)(?:@([1-9][0-9]{0,4}))?:([1-9][0-9]{0,8})")
POOL = 32  # fresh sources a batch; each target edits some of them
ENDS = 0.1  # part of the targets at each end of the trade-off


# Stages


@dataclass(frozen=True)
class TrainingStage:
    """A part of the schedule: the terms that are minimised, and for how many steps."""

    terms: tuple[str, ...]
    steps: int
    render_size: int | None = None
    """Size in px of the images of the transfer term; None: the generator's own."""


def parse_schedule(texts: Sequence[str]) -> tuple[TrainingStage, ...]:
    """Return the stages of texts NAME[+NAME...][@SIZE]:STEPS.
    ValueError: no stage, a text of another form, unknown or repeated terms, or a size where nothing
    is rendered."""
    if not texts:
        raise ValueError("--schedule: expected stages such as pairs:1000 transfer:4000, found none")
    stages = []
    for text in texts:
        parts = STAGE.fullmatch(text)
        names = parts[1].split("+") if parts else []
        unknown = [name for name in names if name not in TERMS]
        if not parts or unknown or len(set(names)) < len(names):
            hint = did_you_mean(unknown[0], TERMS) if unknown else ""
            raise ValueError(
                f"--schedule: expected NAME[+NAME...][@SIZE]:STEPS with different names of "
                f"{', '.join(TERMS)} and 1 step or more, found {text!r}{hint}"
            )
        terms = tuple(name for name in TERMS if name in names)
        size = int(parts[2]) if parts[2] else None
        if size is not None and "transfer" not in terms:
            raise ValueError(f"--schedule: @{size} is of transfer, which is not in {text!r}")
        stages.append(TrainingStage(terms, int(parts[3]), size))
    return tuple(stages)


def stage_at(stages: Sequence[TrainingStage], step: int) -> TrainingStage:
    """Return the stage that a step belongs to. ValueError: the step is after the last one."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError(f"expected a step before the end, found one {step} after it")


# Terms


def noisy(
    embeddings: Float[Tensor, "batch embed"], noise: float, random: torch.Generator
) -> Float[Tensor, "batch embed"]:
    """Add Gaussian noise of an expected length to unit embeddings, and make them unit again."""
    if noise == 0:
        return embeddings
    drawn = torch.randn(embeddings.shape, generator=random).to(embeddings.device)
    return F.normalize(embeddings + noise / embeddings.shape[1] ** 0.5 * drawn, dim=1)


def drawn_places(count: int, random: torch.Generator) -> Float[Tensor, " {count}"]:
    """Return a place on the trade-off for each of so many targets: of ENDS at 0, of as many at 1,
    of the others evenly between.

    Each target draws from a part of the range of its own, so that a batch has all of it: losses
    differ more by their place than by their target.
    """
    parts = torch.randperm(count, generator=random) + torch.rand(count, generator=random)
    return ((parts / count - ENDS) / (1 - 2 * ENDS)).clamp(0, 1)


@dataclass(frozen=True)
class Mixtures:
    """The last targets of a batch, as mixtures of two or three of its targets."""

    mates: Int[Tensor, "mixtures 3"]
    """Rows of the targets that are mixed; the first is the row itself."""
    weights: Float[Tensor, "mixtures 3"]
    """They sum to 1."""

    def to(self, device: torch.device) -> "Mixtures":
        """Return these mixtures on a device."""
        return Mixtures(self.mates.to(device), self.weights.to(device))

    def mixed(self, parts: Float[Tensor, "parts ..."]) -> Float[Tensor, "mixtures ..."]:
        """Return weighted sums of what belongs to the rows `mates.flatten()`."""
        rows = parts.unflatten(0, self.mates.shape)
        weighted: Tensor = rows * self.weights.view(*self.mates.shape, *[1] * (rows.ndim - 2))
        return weighted.sum(dim=1)


def drawn_mixtures(count: int, batch: int, random: torch.Generator) -> Mixtures:
    """Return mixtures of so many last targets of a batch with the next ones, by weights that are
    evenly distributed: of three targets, and of two in every second one."""
    rows = torch.arange(batch - count, batch)
    shares = -(1 - torch.rand(count, 3, generator=random)).log()  # in proportion: Dirichlet's
    shares[::2, 2] = 0
    return Mixtures(
        (rows[:, None] + torch.arange(3)) % batch, F.normalize(shares + 1e-12, p=1, dim=1)
    )


class Objective(nn.Module):
    """The loss of a batch, which is drawn from its own seed alone.

    The mapper is its only part with weights: the frozen networks and the data are not registered,
    so that a parallel wrapper neither sends nor waits for them.
    """

    def __init__(
        self,
        mapper: Mapper,
        *,
        scene: Scene,
        recipe: Recipe,
        sizes: BatchSizes,
        targets: Float32[ndarray, "targets embed"] | None,
        pairs: Pairs | None,
        reading: SourceReading,
        mixtures: float = 0.0,
    ) -> None:
        super().__init__()
        self.mapper, self.reading = mapper, reading
        # At least one is corrected, for the expected score to learn from.
        self.uncorrected = min(round(reading.uncorrected * sizes.batch_size), sizes.batch_size - 1)
        self.scene, self.recipe, self.sizes = scene, recipe, sizes
        self.targets, self.training_pairs = targets, pairs
        self.tradeoff = mapper.config.tradeoff
        # Here too: the expected score is that of one target.
        most = sizes.batch_size - self.uncorrected - 1
        self.mixtures = min(round(mixtures * sizes.batch_size), most)

    def draw_places(self, count: int, random: torch.Generator) -> Float[Tensor, " {count}"] | None:
        """Return a place on the trade-off for each target; None where the mapper reads none."""
        if self.tradeoff is None:
            return None
        return drawn_places(count, random).to(self.scene.device)

    def target_embeddings(self, random: torch.Generator) -> Float[Tensor, "batch embed"]:
        """Return unit embeddings of random training targets: of the bank and of the pairs alike."""
        banked = 0 if self.targets is None else len(self.targets)
        pairs = self.training_pairs
        total = banked + (0 if pairs is None else len(pairs))
        chosen = torch.randint(total, (self.sizes.batch_size,), generator=random)
        embeddings = torch.empty(len(chosen), self.scene.embedder.embed_dim)
        of_bank = chosen < banked
        if self.targets is not None:
            embeddings[of_bank] = torch.from_numpy(self.targets[chosen[of_bank].numpy()])
        if pairs is not None:
            embeddings[~of_bank] = pairs.embeddings[chosen[~of_bank] - banked]
        return embeddings.to(self.scene.device)

    def weights_at(
        self, keep: Float[Tensor, " batch"] | None
    ) -> tuple[float | Tensor, float | Tensor, Tensor | None]:
        """Return the weight decay of edits, that of corrections and the weight of identity: those
        of each target's place, or of the recipe (None) where the mapper reads no trade-off."""
        recipe, own = self.recipe, self.reading.decay
        if self.tradeoff is None or keep is None:
            return recipe.weight_decay, own, None
        decay = self.tradeoff.decay(keep)
        # In the proportion that they have by the recipe, which is that of the middle
        return decay, own / recipe.weight_decay * decay, self.tradeoff.identity_weight(keep)

    def mixed_answers(
        self,
        mixtures: Mixtures,
        embeddings: Float[Tensor, "batch embed"],
        sources: Float[Tensor, "batch sources num_ws w_dim"],
        keep: Float[Tensor, " batch"] | None,
    ) -> tuple[
        Float[Tensor, "mixtures num_ws w_dim"], Float[Tensor, "mixtures sources num_ws w_dim"]
    ]:
        """Return the directions and the corrections of mixtures: those of their targets for the
        mixture's own sources and place, mixed as the product mixes them."""
        its = mixtures.mates[:, :1].expand(-1, 3).flatten()
        targets, place = embeddings[mixtures.mates.flatten()], None if keep is None else keep[its]
        directions = self.predict(targets, place).directions
        with torch.autocast(self.scene.device.type, enabled=False):
            corrections = self.mapper.correct(targets, sources[its], place)
        return mixtures.mixed(directions), mixtures.mixed(corrections)

    def transfer(
        self, random: torch.Generator, seed: int, render_size: int | None = None
    ) -> dict[str, Tensor]:
        """Return the recipe's objective for random targets on fresh sources, and the squared error
        of the expected score."""
        scene, recipe, reading = self.scene, self.recipe, self.reading
        targets = self.target_embeddings(random)
        embeddings = noisy(targets, self.sizes.noise, random)
        keep = self.draw_places(len(targets), random)
        held, own, identity = self.weights_at(keep)
        prediction = self.predict(embeddings, keep)
        directions = prediction.directions
        rendering = recipe.preprocess, recipe.identity_weight, render_size
        count = max(POOL, recipe.sources)
        seeds = [seed_of("mapper source", seed, i) for i in range(count)]
        pool = training_sources(scene, seeds, reading.kinds)
        with torch.no_grad():
            before = scene.features(pool, *rendering)
        chosen = draw_sources(count, recipe.sources, True, [random] * len(targets)).to(scene.device)
        sources, mixtures = pool[chosen], None
        mixed_corrections = sources[:0]
        if self.mixtures:
            mixtures = drawn_mixtures(self.mixtures, len(targets), random).to(scene.device)
            mixed, mixed_corrections = self.mixed_answers(mixtures, embeddings, sources, keep)
            directions = torch.cat([directions[: -self.mixtures], mixed])
        edits = directions[:, None]
        decay = held / 2 * directions.square().sum(dim=(1, 2))
        corrected = torch.ones(len(targets), dtype=torch.bool, device=scene.device)
        if self.mapper.correction is not None:
            corrected = torch.arange(len(targets), device=scene.device) >= self.uncorrected
            with torch.autocast(scene.device.type, enabled=False):
                corrections = self.mapper.correct(embeddings, sources, keep)
                if mixtures is not None:
                    corrections = torch.cat([corrections[: -self.mixtures], mixed_corrections])
                corrections = corrections * corrected[:, None, None, None]
            edits = edits + corrections
            squares = edits.square().sum(dim=(2, 3)), corrections.square().sum(dim=(2, 3))
            if isinstance(held, Tensor) and isinstance(own, Tensor):
                held, own = held[:, None], own[:, None]
            # The edit of each source is held as a direction is, and its own part further: of all
            # ways to share an edit, the cheapest has the mean of all edits in the direction.
            decay = (held * squares[0] + own * squares[1]).mean(dim=1) / 2
        edited = (sources + edits).flatten(0, 1)
        after = scene.features(edited, *rendering)
        after = after.unflatten(0, chosen.shape)
        losses = losses_of(recipe, before[chosen], after, targets, identity)
        loss = losses.loss + decay
        if mixtures is not None:
            # Of a mixture the transfer loss is that of its targets, in its proportions.
            rows = after[-self.mixtures :, :, : targets.shape[1]].repeat_interleave(3, dim=0)
            wanted = mixtures.mixed(transfer_loss(rows, targets[mixtures.mates.flatten()]))
            apart = wanted - losses.transfer[-self.mixtures :]
            loss = loss + recipe.transfer_weight * F.pad(apart, (len(loss) - len(apart), 0))
            corrected = corrected.clone()  # as it was, it is needed backward
            corrected[-self.mixtures :] = False  # the expected score is that of one target
        reached = (1 - losses.transfer).detach()
        errors = (prediction.expected - reached)[corrected].square()
        return {
            "transfer": loss.mean(),
            # The head's features are detached: it learns beside the direction, whatever its weight.
            "expected": errors.mean(),
        }

    def pairs(self, random: torch.Generator) -> dict[str, Tensor]:
        """Return the squared error of the optimizer's directions, in units of their deviation."""
        pairs = self.training_pairs
        assert pairs is not None, "a stage of pairs has pairs"
        chosen = torch.randint(len(pairs), (self.sizes.pairs_batch_size,), generator=random)
        embeddings = pairs.embeddings[chosen].to(self.scene.device)
        keep = None
        if self.tradeoff is not None:
            # The place whose weights are nearest to those that the pairs were found by
            keep = MIDDLE if pairs.recipe is None else self.tradeoff.nearest(pairs.recipe)
        directions = self.predict(noisy(embeddings, self.sizes.noise, random), keep).directions
        error = (directions - pairs.directions(chosen).to(self.scene.device)) / self.mapper.scale
        return {"pairs": error.square().mean()}

    def differences(self, random: torch.Generator, seed: int) -> dict[str, Tensor]:
        """Return the squared error of differences of random latents, in units of the scale."""
        scene, count = self.scene, self.sizes.differences_batch_size
        ws = scene.latents([seed_of("mapper latent", seed, i) for i in range(2 * count)])
        with torch.no_grad():
            embeddings = scene.features(ws, self.recipe.preprocess)
        embeddings = F.normalize(embeddings.float(), dim=1)
        first, second = noisy(embeddings, self.sizes.noise, random).split(count)
        # The difference of two latents is the same wherever on the trade-off.
        keep = self.draw_places(count, random)
        with torch.autocast(scene.device.type, enabled=False):
            directions = self.mapper.directions_of_differences(second - first, keep)
        error = (directions - (ws[count:] - ws[:count])) / self.mapper.scale
        return {"differences": error.square().mean()}

    def predict(
        self, embeddings: Float[Tensor, "batch embed"], keep: Keep | None = None
    ) -> Prediction:
        """Call the mapper in float32: it is a small part of a step, and the part that learns."""
        with torch.autocast(self.scene.device.type, enabled=False):
            prediction: Prediction = self.mapper(embeddings, keep)
        return prediction

    def forward(
        self, terms: Sequence[str], seed: int, render_size: int | None = None
    ) -> dict[str, Tensor]:
        """Return `loss`, the sum of the terms, and each term, as means over the batch."""
        random = torch.Generator().manual_seed(seed)
        losses: dict[str, Tensor] = {}
        if "transfer" in terms:
            losses |= self.transfer(random, seed, render_size)
        if "pairs" in terms:
            losses |= self.pairs(random)
        if "differences" in terms:
            losses |= self.differences(random, seed)
        loss = sum(losses.values(), torch.zeros(()))
        # Processes that average gradients wait for every parameter's, and only one term has the
        # score's and the correction's.
        mapper = self.mapper
        heads = (mapper.score, mapper.score_linear, mapper.keep_score, mapper.correction)
        loss = loss + 0 * sum(
            p.sum() for head in heads if head is not None for p in head.parameters()
        )
        return {"loss": loss, **losses}
