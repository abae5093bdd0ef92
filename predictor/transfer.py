"""EssenceTransfer: a target in, a direction out, edits of any source.

Knows how a scene, a mapper and the optimizer work together. Every direction carries the method that
made it. Files and printing belong to the command line.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from predictor import Mode
from predictor.correction import SourceCorrection
from predictor.direction import (
    Direction,
    Gate,
    Interrupted,
    Method,
    WatchSearch,
    WatchStep,
    direction_so_far,
    optimized_direction,
    strength_at_floor,
)
from predictor.mapper import FoldedMapper, Mapper, Prediction, load_mapper
from predictor.mapper_file import check_made_for, trained_recipe
from predictor.text import TextEmbedder, TextTargets
from targetclip.encoders.identity import identity_similarity
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Initial, Preprocess, Recipe
from targetclip.scene import Scene, Scores
from targetclip.seeds import probe_seeds, seed_of
from targetclip.world import World, load_scene, load_world

PictureOrText = Image.Image | str
"""A target: a picture, or a text where the world has neutral texts."""


class EssenceTransfer:
    """Gives sources a target's essence: a scene and a mapper.

    Args:
        mapper: trained for the generator and the embedder of the scene; None: only mode "optimize".
        texts: how a text becomes a target; None: texts are refused.
        aligner: cuts the face out of a target picture before the picture is inverted; None:
            pictures are inverted whole. The embedder always gets the whole picture.
        recipe: of the optimizer, where none is given.

    Raises:
        ValueError: a mapper of another generator or another embedder.
    """

    def __init__(
        self,
        scene: Scene,
        mapper: Mapper | None = None,
        *,
        texts: TextTargets | None = None,
        aligner: Callable[[Image.Image], Image.Image] | None = None,
        recipe: Recipe = RECIPES["consistent"],
    ) -> None:
        self.scene = scene
        self.mapper = mapper
        self.texts = texts
        self.aligner = aligner
        self.recipe = recipe
        self.bank_features: dict[tuple[Preprocess, bool], Tensor] = {}
        if mapper is not None:
            fingerprints = scene.generator.fingerprint, scene.embedder.fingerprint
            check_made_for(mapper.config, *fingerprints, "the mapper")

    @cached_property
    def trained(self) -> Recipe:
        """The recipe that the mapper was trained by; its targets need the same preprocessing."""
        return trained_recipe(None if self.mapper is None else self.mapper.record)

    @cached_property
    def folded(self) -> FoldedMapper:
        """The mapper's faster form, made at the first answer."""
        return FoldedMapper(self.asked_mapper())

    def asked_mapper(self) -> Mapper:
        """Return the mapper; raise a ValueError where there is none."""
        if self.mapper is None:
            raise ValueError(
                "there is no mapper, so the optimizer alone finds directions (--mode optimize); "
                "train one: python -m train.mapper --help"
            )
        return self.mapper

    # Targets

    def source_embeddings(
        self, preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "bank embed"]:
        """Return the embeddings of the bank's sources, computed once for each preprocessing."""
        return self.source_features(preprocess, 0.0)

    def source_features(
        self, preprocess: Preprocess, identity_weight: float
    ) -> Float[Tensor, "bank features"]:
        """Return the features of the bank's sources (see `Scene.features`), computed once."""
        key = (preprocess, bool(identity_weight))
        if key not in self.bank_features:
            with torch.no_grad():
                self.bank_features[key] = self.scene.features(
                    self.scene.bank(), preprocess, identity_weight
                )
        return self.bank_features[key]

    def embed_target(
        self, target: PictureOrText, recipe: Recipe | None = None
    ) -> Float[Tensor, " embed"]:
        """Return the embedding of a target, its picture preprocessed as the recipe wants it or, by
        default, as the embedder's own library does. ValueError: a text, and there are no `texts`.
        """
        if not isinstance(target, str):
            return self.scene.embed_targets([target], recipe or RECIPES["consistent"])[0]
        if self.texts is None:
            raise ValueError(f"{target!r} is a text, and this world has no neutral texts")
        return self.texts.embed(target, self.source_embeddings())

    def initial(
        self, target: PictureOrText, kind: Initial, seed: int
    ) -> Float[Tensor, "num_ws w_dim"]:
        """Return where an optimization starts (release: an absolute latent, not an offset).

        Raises:
            ValueError: the inversion of a text, or there is no inverter; or as the aligner.
        """
        picture = Image.new("RGB", (1, 1)) if isinstance(target, str) else target
        if kind == "inversion" and isinstance(target, str):
            raise ValueError(
                f"{target!r} is a text, which has no inversion to start from: "
                "start at zero or at a random latent"
            )
        if kind == "inversion" and self.aligner is not None:
            picture = self.aligner(picture)
        return self.scene.initial([picture], kind, [seed_of("initial", seed)])[0]

    # Directions

    def direction(
        self,
        target: PictureOrText,
        mode: Mode = "auto",
        recipe: Recipe | None = None,
        seed: int = 0,
        watch: WatchSearch | None = None,
    ) -> Direction:
        """Find the direction of a target.

        Args:
            mode: "instant": the mapper's answer. "refine": that answer, refined by the optimizer.
                "optimize": the optimizer's result. "auto": the first of the three whose score on
                the probe sources reaches the mapper's threshold, or the best of them.
            recipe: of the optimizer. None: the one given at construction.
            seed: of the optimizer's random numbers.

        Raises:
            ValueError: the mode needs a mapper, or a calibrated one, or an identity model; see
                `embed_target` and `initial`.
            FloatingPointError: the optimizer's loss is not finite.
            Interrupted: Ctrl-C during a search.
        """
        recipe = recipe or self.recipe
        if mode == "optimize":
            return self.optimize(target, recipe, seed, watch and watch("optimizer", recipe))
        if mode == "instant":
            return self.predict(target)
        gate = Gate.of(self.asked_mapper())
        refining = gate.refining(recipe, self.trained)
        # Checked now, not after minutes of searching.
        if refining.identity_weight and self.scene.identity is None:
            raise ValueError(
                "refining this mapper's answers needs an identity model, found none: name one in "
                "the world's file, or ask the mapper unchecked (--mode instant)"
            )
        if mode == "auto":
            self.scene.feature_model(recipe.identity_weight)
        predicted = self.predict(target)
        if mode == "refine":
            return self.refine(target, predicted, refining, seed, watch)
        return gate.first_that_passes(
            predicted,
            (
                lambda: self.refine(target, predicted, refining, seed, watch),
                lambda: self.optimize(target, recipe, seed, watch and watch("optimizer", recipe)),
            ),
            partial(self.probe_score, self.embed_target(target), probes=gate.probes),
        )

    def predict(self, target: PictureOrText) -> Direction:
        """Return the mapper's answer."""
        folded = self.folded  # before anything is embedded
        vector, expected = folded(self.embed_target(target, self.trained)[None])
        return Direction(vector=vector, method="mapper", expected=expected)

    def correction(self, target: PictureOrText) -> SourceCorrection | None:
        """Return what is added to the mapper's answer for each source; None where the mapper has
        no correction."""
        return self.folded.correction(self.embed_target(target, self.trained)[None])

    def predict_embeddings(self, embeddings: Float[Tensor, "targets embed"]) -> Prediction:
        """Return the mapper's answers to embeddings, raw or unit."""
        with torch.no_grad():
            prediction: Prediction = self.asked_mapper()(embeddings)
        return prediction

    def probe_score(
        self, embedding: Float[Tensor, " embed"], vector: Float[Tensor, "num_ws w_dim"], probes: int
    ) -> float:
        """Return the transfer score of a direction on the first so many probe sources."""
        ws = self.scene.latents(probe_seeds(probes))
        with torch.no_grad():
            edited = self.scene.features(ws + vector)
        return float(F.cosine_similarity(edited, embedding[None]).mean())

    def refine(
        self,
        target: PictureOrText,
        predicted: Direction,
        recipe: Recipe,
        seed: int = 0,
        watch: WatchSearch | None = None,
    ) -> Direction:
        """Run the optimizer from a prediction; raises as `direction` does."""
        on_step = watch and watch("refined", recipe)
        direction = self.search(target, recipe, predicted.vector, "refined", seed, on_step)
        return replace(direction, expected=predicted.expected)

    def optimize(
        self, target: PictureOrText, recipe: Recipe, seed: int = 0, on_step: WatchStep | None = None
    ) -> Direction:
        """Run the optimizer from the recipe's start; raises as `direction` does."""
        start = self.initial(target, recipe.initial, seed)
        return self.search(target, recipe, start, "optimizer", seed, on_step)

    def search(
        self,
        target: PictureOrText,
        recipe: Recipe,
        start: Float[Tensor, "num_ws w_dim"],
        method: Method,
        seed: int,
        on_step: WatchStep | None,
    ) -> Direction:
        """Run the optimizer from a start."""
        latest: Progress | None = None

        def remember(progress: Progress) -> None:
            nonlocal latest
            latest = progress
            if on_step is not None:
                on_step(progress)

        features = None
        if recipe.fresh_sources:
            features = self.source_features(recipe.preprocess, recipe.identity_weight)
        try:
            result = self.scene.search(
                self.embed_target(target, recipe)[None],
                recipe,
                start[None],
                [seed_of("target", seed)],
                bank_features=features,
                on_step=remember,
            )
        except KeyboardInterrupt:
            if latest is None:
                raise
            raise Interrupted(direction_so_far(latest, method)) from None
        if result.failures[0] is not None:
            raise FloatingPointError(f"no direction found: {result.failures[0]}")
        return optimized_direction(result, method)

    # Edits

    def edit(
        self,
        source_ws: Float[Tensor, "sources num_ws w_dim"],
        direction: Float[Tensor, "num_ws w_dim"],
        strength: float = 1.0,
    ) -> Float[Tensor, "sources 3 height width"]:
        """Return images in [-1, 1] of sources moved along a direction."""
        return self.scene.edit(source_ws, direction, strength)

    def strength_at_identity(
        self,
        source_ws: Float[Tensor, "sources num_ws w_dim"],
        direction: Float[Tensor, "num_ws w_dim"],
        floor: float,
        highest: float = 1.0,
    ) -> float:
        """Return the largest strength up to which sources keep a mean identity similarity of
        `floor`, in [-1, 1]. ValueError: there is no identity model."""
        model = self.scene.identity
        if model is None:
            raise ValueError("there is no identity model to hold a floor by: choose a strength")
        before = self.edit(source_ws, direction, 0.0)

        def identity_at(strength: float) -> float:
            edited = self.edit(source_ws, direction, strength)
            return float(identity_similarity(model, before, edited).mean())

        return strength_at_floor(identity_at, highest, floor)

    def score(
        self,
        target: PictureOrText,
        sources: Float[Tensor, "sources 3 height width"],
        edited: Float[Tensor, "sources 3 height width"],
    ) -> Scores:
        """Score edits, through the embedder's own preprocessing whatever the recipe."""
        return self.scene.score_images(self.embed_target(target), sources, edited)


def essence_of(
    scene: Scene,
    world: World,
    mapper: Path | None = None,
    aligner: Callable[[Image.Image], Image.Image] | None = None,
) -> EssenceTransfer:
    """Join a scene of a world with a mapper, loaded as by `load_mapper`; None: the world's."""
    loaded = texts = None
    if path := mapper or world.mapper:
        loaded, _ = load_mapper(path, scene.generator.fingerprint, scene.embedder.fingerprint)
        loaded.to(scene.device)
    if world.neutral and isinstance(scene.embedder, TextEmbedder):
        texts = TextTargets(scene.embedder, world.neutral)
    return EssenceTransfer(
        scene, loaded, texts=texts, aligner=aligner, recipe=RECIPES[world.recipe]
    )


def load_essence(
    world: World | str,
    device: torch.device | None = None,
    mapper: Path | None = None,
    *,
    max_images: int | None = None,
    checkpoint_layers: bool = False,
) -> EssenceTransfer:
    """Load a world's networks and its mapper, or another mapper.

    Args:
        world: a world, its name or the path of its file.
        device, max_images, checkpoint_layers: see `load_scene`.

    Raises:
        FileNotFoundError, ValueError: as `load_world`, `load_scene` and `load_mapper`.
    """
    if isinstance(world, str):
        world = load_world(world)
    scene = load_scene(world, device, max_images=max_images, checkpoint_layers=checkpoint_layers)
    return essence_of(scene, world, mapper)
