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

import torch
from jaxtyping import Float, Float32
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.mapper import Mapper, Prediction
from predictor.tradeoff import MIDDLE, Keep
from targetclip.losses import transfer_loss
from targetclip.optimize import draw_sources, losses_of
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.seeds import seed_of
from train.mapper_batches import (
    Mixtures,
    SourceReading,
    drawn_mixtures,
    drawn_places,
    noisy,
    training_sources,
)
from train.mapper_data import Pairs
from train.mapper_settings import BatchSizes

TERMS = ("transfer", "pairs", "differences")
STAGE = re.compile(r"([a-z]+(?:\+[a-z]+)*)(?:@([1-9][0-9]{0,4}))?:([1-9][0-9]{0,8})")
POOL = 32  # fresh sources a batch; each target edits some of them
ENDS = 0.1  # part of the targets at each end of the trade-off


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
        # In the proportion that they have by the recipe, which is that of the middle or the origin
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
        after = scene.features(edited, *rendering).unflatten(0, chosen.shape)
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
        parts = [p.sum() for head in heads if head is not None for p in head.parameters()]
        return {"loss": loss + 0 * sum(parts), **losses}
