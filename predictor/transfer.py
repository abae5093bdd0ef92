"""EssenceTransfer: a target in, a direction out, edits of any source.

Knows how the parts work together: mapper, optimizer, embedder, generator and inverter, all passed
in. Every direction says which method made it. Files and printing are the command line's.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from predictor.direction import (
    Direction,
    Interrupted,
    Method,
    better,
    direction_so_far,
    optimized_direction,
)
from predictor.folded import FoldedMapper
from predictor.gate import Gate
from predictor.mapper import Mapper, Prediction
from predictor.mapper_file import check_made_for, trained_recipe
from predictor.strength import strength_at_floor
from predictor.text import TextTargets
from targetclip.editing import Scores, apply_direction, render, score_edit
from targetclip.embedder import ImageEmbedder
from targetclip.recipes import Preprocess
from targetclip.encoders.identity import IdentityModel, feature_model, identity_similarity
from targetclip.encoders.inverter import LatentInverter
from targetclip.generators import Generator
from targetclip.optimize import Progress, embed_latents, optimize_directions
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.sources import generated_sources, source_bank
from targetclip.scene import random_latents
from targetclip.seeds import BANK, seed_of
from targetclip.targets import embed_targets, initial_directions, invert

Mode = Literal["instant", "auto", "refine", "optimize"]
WatchStep = Callable[[Progress], None]
WatchSearch = Callable[[Method, Recipe], WatchStep]
"""Called as a search begins; what it returns is called after every step."""


class EssenceTransfer:
    """Gives sources a target's essence.

    A target is a picture, or a text where `texts` is given.

    Args:
        generator, embedder: any that keep the protocols.
        inverter: from pictures to latents; None where there is none.
        mapper: trained for this generator and this embedder; None leaves mode "optimize" alone.
        texts: how a text becomes a target.
        identity: says how much of a source is left, for `strength_at_identity` and for recipes
            with an identity loss.
        truncation: of generated sources; 1 is the generator's full variety.
        max_images: rendered at once; bounds memory.
        aligner: cuts the face out of a target picture before it is inverted; None where pictures
            are inverted as they are. The embedder always sees the whole picture.
        recipe: of the optimizer, where none is given; default "consistent".

    Raises:
        ValueError: a mapper of another generator or another embedder.
    """

    def __init__(
        self,
        generator: Generator,
        embedder: ImageEmbedder,
        inverter: LatentInverter | None = None,
        mapper: Mapper | None = None,
        texts: TextTargets | None = None,
        identity: IdentityModel | None = None,
        truncation: float = 0.7,
        max_images: int = 64,
        aligner: Callable[[Image.Image], Image.Image] | None = None,
        recipe: Recipe = RECIPES["consistent"],
    ) -> None:
        self.generator = generator
        self.embedder = embedder
        self.inverter = inverter
        self.mapper = mapper
        self.texts = texts
        self.identity = identity
        self.truncation = truncation
        self.max_images = max_images
        self.aligner = aligner
        self.recipe = recipe
        self.seen: dict[tuple[Preprocess, bool], Tensor] = {}
        if mapper is not None:
            config = mapper.config
            check_made_for(config, generator.fingerprint, embedder.fingerprint, "the mapper")

    @cached_property
    def trained(self) -> Recipe:
        """What the mapper was trained by, and so how targets are shown to it.

        Raises:
            ValueError: a recipe that is unknown here.
        """
        return trained_recipe(None if self.mapper is None else self.mapper.record)

    # Sources and targets

    def invert(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "sources num_ws w_dim"]:
        """Latents of pictures.

        Raises:
            ValueError: there is no inverter.
        """
        return invert(self.generator, self.inverter, pictures)

    def generated_sources(self, count: int, seed: int = 0) -> Float[Tensor, "sources num_ws w_dim"]:
        """Latents of the generator's own samples; source i of a seed is always the same."""
        return generated_sources(self.generator, self.truncation, count, seed)

    def source_embeddings(
        self, preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "bank embed"]:
        """Embeddings of the bank's sources: what pictures without a wanted essence look like.

        Made once for each preprocessing.
        """
        return self.seen_sources(preprocess, 0.0)

    def seen_sources(
        self, preprocess: Preprocess, identity_weight: float
    ) -> Float[Tensor, "bank seen"]:
        """What a search of such a weight sees of the bank's sources (`feature_model`), made once."""
        known = (preprocess, bool(identity_weight))
        if known not in self.seen:
            bank = source_bank(self.generator, self.truncation, BANK)
            seeing = feature_model(self.embedder, self.identity, identity_weight)
            with torch.no_grad():
                self.seen[known] = embed_latents(
                    self.generator, seeing, bank, preprocess, self.max_images
                )
        return self.seen[known]

    def embed_target(
        self, target: Image.Image | str, recipe: Recipe | None = None
    ) -> Float[Tensor, " embed"]:
        """Embedding of a target, a picture preprocessed as a recipe wants it (default: as the
        embedder's own library does).

        Raises:
            ValueError: a text, and no `texts` to make it a target.
        """
        return self.embed_row(target, recipe or RECIPES["consistent"])[0]

    def embed_row(self, target: Image.Image | str, recipe: Recipe) -> Float[Tensor, "1 embed"]:
        """As `embed_target`, a batch of one."""
        if not isinstance(target, str):
            return embed_targets(self.generator, self.embedder, [target], recipe)
        if self.texts is None:
            raise ValueError(f"{target!r} is a text, and this world says nothing of texts")
        return self.texts.embed(target, self.source_embeddings())[None]

    def initial(
        self, target: Image.Image | str, kind: Initial, seed: int
    ) -> Float[Tensor, "num_ws w_dim"]:
        """What an optimization starts from (release: absolute latents, not offsets).

        Raises:
            ValueError: the inversion of a text, or where there is no inverter; as the aligner.
        """
        if isinstance(target, str):
            if kind == "inversion":
                raise ValueError(
                    f"{target!r} is a text, which has no inversion to start from: "
                    "start at zero or at a random latent"
                )
            pictures = [Image.new("RGB", (1, 1))]  # only its inversion would be looked at
        elif kind == "inversion" and self.aligner is not None:
            pictures = [self.aligner(target)]
        else:
            pictures = [target]
        seeds = [seed_of("initial", seed)]
        return initial_directions(self.generator, self.inverter, pictures, kind, seeds)[0]

    # Directions

    def direction(
        self,
        target: Image.Image | str,
        mode: Mode = "auto",
        recipe: Recipe | None = None,
        seed: int = 0,
        watch: WatchSearch | None = None,
    ) -> Direction:
        """Find the direction of a target.

        Modes: "instant" asks the mapper; "auto" as well, but checks its answer on the probe
        sources and, where that falls short of the mapper's threshold, refines it, and where that
        does too, runs the optimizer; "refine" always refines; "optimize" asks no mapper.

        Args:
            recipe: of the optimizer; default: the one this was made with.
            seed: decides everything the optimizer draws.
            watch: told of every search.

        Raises:
            ValueError: the mode needs a mapper, or one that is calibrated; see `embed_target` and
                `initial`.
            FloatingPointError: the optimizer's loss stopped being finite.
            Interrupted: Ctrl-C during a search.
        """
        recipe = recipe or self.recipe
        if mode == "optimize":
            return self.optimize(target, recipe, seed, watch and watch("optimizer", recipe))
        if mode == "instant":
            return self.predict(target)
        gate = Gate.of(self.asked_mapper())
        refining = gate.refining(recipe, self.trained)
        # Not only once they are needed, when minutes may have been spent.
        if refining.identity_weight and self.identity is None:
            raise ValueError(
                "the mapper was trained with an identity loss, and refining its answers needs an "
                "identity model, found none: name one in the world's file, or ask the mapper "
                "unchecked (--mode instant)"
            )
        if mode == "auto":
            feature_model(self.embedder, self.identity, recipe.identity_weight)
        predicted = self.predict(target)
        if mode == "refine":
            return self.refine(target, predicted, refining, seed, watch)
        return self.checked(target, predicted, recipe, refining, gate, seed, watch)

    def asked_mapper(self) -> Mapper:
        """The mapper; a ValueError where there is none."""
        if self.mapper is None:
            raise ValueError(
                "there is no mapper, so the optimizer alone finds directions (--mode optimize); "
                "train one: python -m train.mapper --help"
            )
        return self.mapper

    def predict(self, target: Image.Image | str) -> Direction:
        """The mapper's answer, in one pass."""
        folded = self.folded  # before anything is embedded
        vector, expected = folded(self.embed_row(target, self.trained))
        return Direction(vector, "mapper", expected)

    @cached_property
    def folded(self) -> FoldedMapper:
        """The mapper as `predict` asks it: as it was, and where, at the first answer. To change,
        move or replace it after that, make another EssenceTransfer."""
        return FoldedMapper(self.asked_mapper())

    def predict_embeddings(self, embeddings: Float[Tensor, "targets embed"]) -> Prediction:
        """The mapper's answers for embeddings of many targets, raw or unit."""
        with torch.no_grad():
            prediction: Prediction = self.asked_mapper()(embeddings)
        return prediction

    def checked(
        self,
        target: Image.Image | str,
        predicted: Direction,
        recipe: Recipe,
        refining: Recipe,
        gate: Gate,
        seed: int,
        watch: WatchSearch | None,
    ) -> Direction:
        """The first of prediction, refinement and optimization that the gate lets pass, or the
        best of them on the probe sources."""
        embedding = self.embed_target(target)

        def probed(direction: Direction) -> Direction:
            score = self.probe_score(embedding, direction.vector, gate.probes)
            return replace(direction, expected=predicted.expected, probe=score)

        def refine() -> Direction:
            return self.refine(target, predicted, refining, seed, watch)

        def optimize() -> Direction:
            return self.optimize(target, recipe, seed, watch and watch("optimizer", recipe))

        best, steps = probed(predicted), 0
        for search in (refine, optimize):
            if best.probe is not None and gate.passes(best.probe):
                break
            try:
                found = probed(search())
            except Interrupted as stopped:
                found = probed(stopped.direction)
                best = replace(better(best, found), steps=steps + found.steps)
                raise Interrupted(best) from None
            except KeyboardInterrupt:  # before the search's first step
                raise Interrupted(best) from None
            except FloatingPointError:  # what there was is still there, and its score tells
                continue
            steps += found.steps
            best = replace(better(best, found), steps=steps)
        return best

    def probe_score(
        self,
        embedding: Float[Tensor, " embed"],
        vector: Float[Tensor, "num_ws w_dim"],
        probes: int,
    ) -> float:
        """Transfer score on sources that are for probing alone: the first so many of them."""
        seeds = [seed_of("probe", i) for i in range(probes)]
        ws = random_latents(self.generator, seeds, self.truncation)
        with torch.no_grad():
            edited = embed_latents(
                self.generator, self.embedder, ws + vector, "consistent", self.max_images
            )
        return float(F.cosine_similarity(edited, embedding[None]).mean())

    def refine(
        self,
        target: Image.Image | str,
        predicted: Direction,
        recipe: Recipe,
        seed: int = 0,
        watch: WatchSearch | None = None,
    ) -> Direction:
        """The optimizer, started at a prediction."""
        on_step = watch and watch("refined", recipe)
        found = self.search(target, recipe, predicted.vector, "refined", seed, on_step)
        return replace(found, expected=predicted.expected)

    def optimize(
        self,
        target: Image.Image | str,
        recipe: Recipe,
        seed: int = 0,
        on_step: WatchStep | None = None,
    ) -> Direction:
        """Find a direction by the iterative optimizer; raises as `direction` does."""
        start = self.initial(target, recipe.initial, seed)
        return self.search(target, recipe, start, "optimizer", seed, on_step)

    def search(
        self,
        target: Image.Image | str,
        recipe: Recipe,
        start: Float[Tensor, "num_ws w_dim"],
        method: Method,
        seed: int,
        on_step: WatchStep | None,
    ) -> Direction:
        """Run the optimizer from a start."""
        latest: list[Progress] = []

        def remember(progress: Progress) -> None:
            latest[:] = [progress]
            if on_step is not None:
                on_step(progress)

        count = BANK if recipe.fresh_sources else recipe.sources
        try:
            found = optimize_directions(
                self.generator,
                self.embedder,
                self.embed_target(target, recipe)[None],
                source_bank(self.generator, self.truncation, count),
                recipe,
                start[None],
                [seed_of("target", seed)],
                remember,
                self.max_images,
                bank_features=self.seen_sources(recipe.preprocess, recipe.identity_weight)
                if recipe.fresh_sources
                else None,
                identity=self.identity,
            )
        except KeyboardInterrupt:
            if not latest:
                raise
            raise Interrupted(direction_so_far(latest[0], method)) from None
        if found.failures[0] is not None:
            raise FloatingPointError(f"no direction found: {found.failures[0]}")
        return optimized_direction(found, method)

    # Edits

    def edit(
        self,
        source_ws: Float[Tensor, "sources num_ws w_dim"],
        direction: Float[Tensor, "num_ws w_dim"],
        strength: float = 1.0,
    ) -> Float[Tensor, "sources 3 height width"]:
        """Render sources moved along a direction: images in [-1, 1]."""
        edited = apply_direction(source_ws, direction, strength)
        return render(self.generator, edited, self.max_images)

    def strength_at_identity(
        self,
        source_ws: Float[Tensor, "sources num_ws w_dim"],
        direction: Float[Tensor, "num_ws w_dim"],
        floor: float,
        highest: float = 1.0,
    ) -> float:
        """The largest strength up to which sources keep, on average, an identity similarity of
        `floor`, in [-1, 1].

        Raises:
            ValueError: there is no identity model.
        """
        if self.identity is None:
            raise ValueError("there is no identity model to hold a floor by: choose a strength")
        model, before = self.identity, self.edit(source_ws, direction, 0.0)

        def identity_at(strength: float) -> float:
            edited = self.edit(source_ws, direction, strength)
            return float(identity_similarity(model, before, edited).mean())

        return strength_at_floor(identity_at, highest, floor)

    def score(
        self,
        target: Image.Image | str,
        sources: Float[Tensor, "sources 3 height width"],
        edited: Float[Tensor, "sources 3 height width"],
    ) -> Scores:
        """Score edits; always through the embedder's own preprocessing, whatever the recipe."""
        embedding = self.embed_target(target)
        return score_edit(self.embedder, embedding, sources, edited, max_images=self.max_images)
