"""EssenceTransfer: a target in, a direction out; it edits sources as well (predictor.editing).

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
    Method,
    WatchProbe,
    WatchSearch,
    WatchStep,
    mixed,
    searched_direction,
)
from predictor.editing import Editing, Moves
from predictor.folded import FoldedMapper
from predictor.inputs import Target, Text, as_recipe, as_target, check_mode
from predictor.mapper import Mapper, load_mapper
from predictor.mapper_file import check_made_for, trained_recipe
from predictor.text import TextEmbedder, TextTargets
from predictor.tradeoff import NO_TRADEOFF, check_keep
from targetclip.recipes import RECIPES, Initial, Preprocess, Recipe
from targetclip.scene import Scene
from targetclip.scores import Scores, score_features
from targetclip.seeds import probe_seeds, seed_of
from targetclip.world import DEFAULT_WORLD, World, load_scene, load_world


class EssenceTransfer(Editing):
    """Gives sources a target's essence: a scene and a mapper.

    Pictures may be paths, Pillow images, arrays or tensors: see `predictor.inputs.Picture`.

    Args:
        mapper: trained for the generator and the embedder of the scene; None: only mode "optimize".
        texts: how a text becomes a target; None: texts are refused.
        aligner: cuts the face out of a picture before the picture is inverted; None: pictures are
            inverted whole. The embedder always gets the whole picture.
        recipe: of the optimizer, where none is given.

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
        super().__init__(scene, aligner)
        self.mapper, self.texts, self.recipe = mapper, texts, recipe
        self.bank_features: dict[tuple[Preprocess, bool, int | None], Tensor] = {}
        if mapper is not None:
            fingerprints = scene.generator.fingerprint, scene.embedder.fingerprint
            check_made_for(mapper.config, *fingerprints, "the mapper")

    @cached_property
    def trained(self) -> Recipe:
        """The recipe that the mapper was trained by; its targets need the same preprocessing."""
        return trained_recipe(None if self.mapper is None else self.mapper.record)

    def place(self, keep_identity: float | None) -> float | None:
        """Return the place on the trade-off that the mapper answers for; None: it reads none.
        ValueError: a place off the curve, or one where the mapper reads none."""
        mapper = self.asked_mapper()
        if keep_identity is None:
            return mapper.keep
        if mapper.config.tradeoff is None:
            raise ValueError(NO_TRADEOFF)
        check_keep(keep_identity)
        return keep_identity

    def recipe_at(self, recipe: Recipe, place: float | None) -> Recipe:
        """Return a recipe with the identity weight and the weight decay of a place on the mapper's
        trade-off; None: as it is."""
        tradeoff = None if self.mapper is None else self.mapper.config.tradeoff
        if place is None or tradeoff is None:
            return recipe
        if place == tradeoff.origin:
            identity, decay = self.trained.identity_weight, self.trained.weight_decay
            return replace(recipe, identity_weight=identity, weight_decay=decay)
        return tradeoff.recipe_at(recipe, place)

    @cached_property
    def folded(self) -> FoldedMapper:
        """The mapper's faster form, made at the first answer."""
        return FoldedMapper(self.asked_mapper())

    def asked_mapper(self) -> Mapper:
        """Return the mapper; raise a ValueError where there is none."""
        if self.mapper is None:
            raise ValueError(
                'there is no mapper, so the optimizer alone finds directions (mode "optimize"); '
                "train one: python -m train.mapper --help"
            )
        return self.mapper

    # Targets

    def source_features(
        self, preprocess: Preprocess, identity_weight: float, render_size: int | None = None
    ) -> Float[Tensor, "bank features"]:
        """Return the features of the bank's sources (see `Scene.features`), computed once."""
        key, scene = (preprocess, bool(identity_weight), render_size), self.scene
        if key not in self.bank_features:
            with torch.no_grad():
                features = scene.features(scene.bank(), preprocess, identity_weight, render_size)
            self.bank_features[key] = features
        return self.bank_features[key]

    def embed_target(self, target: Target, recipe: Recipe | None = None) -> Float[Tensor, " embed"]:
        """Return the embedding of a target, its picture preprocessed as the recipe wants it or, by
        default, as the embedder's own library does. FileNotFoundError, TypeError: as `as_pictures`.
        ValueError: as `as_target`; a text, and there are no `texts`."""
        target = as_target(target)
        if not isinstance(target, Text):
            return self.scene.embed_targets([target], recipe or RECIPES["consistent"])[0]
        if self.texts is None:
            raise ValueError(f"{target!r} is a text, and this world has no neutral texts")
        return self.texts.embed(target, self.source_features("consistent", 0.0))

    def initial(self, target: Target, kind: Initial, seed: int) -> Float[Tensor, "num_ws w_dim"]:
        """Return where an optimization starts (release: an absolute latent, not an offset).
        ValueError: the inversion of a text, or as `latents_of`."""
        if kind != "inversion":
            blank = Image.new("RGB", (1, 1))
            return self.scene.initial([blank], kind, [seed_of("initial", seed)])[0]
        if isinstance(target, Text):
            raise ValueError(
                f"{target!r} is a text, which has no inversion to start from: "
                "start at zero or at a random latent"
            )
        return self.latents_of(target)[0]

    # Directions

    def direction(
        self,
        target: Target | None = None,
        mode: Mode = "auto",
        recipe: Recipe | str | None = None,
        seed: int = 0,
        watch: WatchSearch | None = None,
        *,
        text: str | None = None,
        watch_probe: WatchProbe | None = None,
        one_direction: bool = False,
        keep_identity: float | None = None,
    ) -> Direction:
        """Find the direction of a target: a picture, or words.

        Args:
            target: a picture, or a `Text`. A str is the path of a picture.
            mode: "instant": the mapper's answer. "refine": that answer, refined by the optimizer.
                "optimize": the optimizer's result. "auto": the first of the three whose score on
                the probe sources reaches the mapper's threshold, or the best of them.
            recipe: of the optimizer, or its name. None: the one given at construction.
            seed: of the optimizer's random numbers.
            text: the target in words, in the place of `target`.
            watch_probe: called in "auto" with every score on the probe sources, and the threshold.
            one_direction: leave out the mapper's correction for each source.
            keep_identity: place on the trade-off, for a mapper that reads one: from 0, most
                essence, to 1, most identity kept. Searches then weigh identity and length as
                the mapper's training did there. None: the mapper's default, and the optimizer
                weighs as the recipe says.

        Raises:
            FileNotFoundError, TypeError: as `as_pictures`.
            ValueError: no such mode or recipe; the mode needs a mapper, or a calibrated one, or an
                identity model; a `keep_identity` that is not from 0 to 1, or that nothing reads;
                see `embed_target` and `initial`.
            FloatingPointError: the optimizer's loss is not finite.
            Interrupted: Ctrl-C during a search.
        """
        check_mode(mode)
        target, recipe = as_target(target, text), as_recipe(recipe, self.recipe)
        if mode == "optimize":
            if keep_identity is not None:
                raise ValueError(
                    "keep_identity: the optimizer weighs identity as its recipe says, and asks no "
                    "mapper: choose another mode"
                )
            return self.optimize(target, recipe, seed, watch and watch("optimizer", recipe))
        place = self.place(keep_identity)
        if mode == "instant":
            return self.predict(target, one_direction, place)
        gate = Gate.of(self.asked_mapper(), place)
        refining = gate.refining(recipe, self.recipe_at(self.trained, place))
        recipe = self.recipe_at(recipe, keep_identity)
        # An identity model that is missing is an error now, not after minutes of searching.
        self.scene.feature_model(refining.identity_weight)
        if mode == "auto":
            self.scene.feature_model(recipe.identity_weight)
        predicted = self.predict(target, one_direction, place)
        if mode == "refine":
            return self.refine(target, predicted, refining, seed, watch)
        embedding = self.embed_target(target)

        def probe(direction: Direction) -> float:
            score = self.probe_score(embedding, direction, gate.probes)
            if watch_probe is not None:
                watch_probe(score, gate.threshold)
            return score

        def optimized() -> Direction:
            found = self.optimize(target, recipe, seed, watch and watch("optimizer", recipe))
            return replace(found, keep_identity=keep_identity)

        return gate.first_that_passes(
            predicted,
            (lambda: self.refine(target, predicted, refining, seed, watch), optimized),
            probe,
        )

    def predict(
        self, target: Target, one_direction: bool = False, keep_identity: float | None = None
    ) -> Direction:
        """Return the mapper's answer, with its correction for each source unless that is left out
        or the mapper has none. ValueError: see `place`."""
        place = self.place(keep_identity)  # an error comes before anything is embedded
        direction = self.answer(self.embed_target(target, self.trained), place)
        return direction.uncorrected() if one_direction else direction

    def answer(self, embedding: Float[Tensor, " embed"], place: float | None) -> Direction:
        """Return the mapper's answer to an embedding, at a `place` that it answers for."""
        vector, expected = self.folded(embedding[None], place)
        return Direction(
            vector=vector,
            method="mapper",
            generator=self.scene.generator.fingerprint,
            expected=expected,
            keep_identity=place,
            correction=self.folded.correction(embedding[None], place),
        )

    def only_named(self, direction: Direction, keep_identity: float | None = None) -> Direction:
        """Return a text's direction less the mapper's answer to the mean source: for mixtures.

        The target of a text is the mean source with a difference, so the mapper's answer also
        brings the mean source's hair and whatever else the text does not name, against the other
        targets. A direction that the optimizer found from its own start is returned as it is.

        Args:
            direction: of a text, as `direction` found it.
            keep_identity: what `direction` was asked for.

        ValueError: there is no mapper, or as `place`.
        """
        if direction.method == "optimizer":
            return direction
        place = self.place(keep_identity)
        sources = F.normalize(self.source_features("consistent", 0.0).float(), dim=1)
        shared = self.answer(F.normalize(sources.mean(dim=0), dim=0), place)
        if direction.correction is None:
            shared = shared.uncorrected()
        less = mixed([direction, shared], [1, -1])
        return direction.changed(less.vector, less.correction)

    def probe_score(
        self, embedding: Float[Tensor, " embed"], direction: Moves, probes: int
    ) -> float:
        """Return the transfer score of a direction on the first so many probe sources."""
        ws = self.scene.latents(probe_seeds(probes))
        with torch.no_grad():
            edited = self.scene.features(ws + self.offsets(ws, direction))
        return float(F.cosine_similarity(edited, embedding[None]).mean())

    def refine(
        self,
        target: Target,
        predicted: Direction,
        recipe: Recipe,
        seed: int = 0,
        watch: WatchSearch | None = None,
    ) -> Direction:
        """Run the optimizer from a prediction, whose correction is held; raises as `direction`
        does."""
        on_step, start = watch and watch("refined", recipe), predicted.vector
        found = self.search(target, recipe, start, "refined", seed, on_step, predicted.correction)
        return replace(found, expected=predicted.expected, keep_identity=predicted.keep_identity)

    def optimize(
        self, target: Target, recipe: Recipe, seed: int = 0, on_step: WatchStep | None = None
    ) -> Direction:
        """Run the optimizer from the recipe's start; raises as `direction` does."""
        start = self.initial(target, recipe.initial, seed)
        return self.search(target, recipe, start, "optimizer", seed, on_step)

    def search(
        self,
        target: Target,
        recipe: Recipe,
        start: Float[Tensor, "num_ws w_dim"],
        method: Method,
        seed: int,
        on_step: WatchStep | None,
        correction: SourceCorrection | None = None,
    ) -> Direction:
        """Run the optimizer from a start, with a correction held beside the direction."""
        features = held = None
        if correction is not None:
            held = correction(self.scene.bank_of(recipe))[None]
        if recipe.fresh_sources:
            features = self.source_features(
                recipe.preprocess, recipe.identity_weight, recipe.render_size
            )
        embedding, seeds = self.embed_target(target, recipe)[None], [seed_of("target", seed)]
        search = partial(self.scene.search, embedding, recipe, start[None], seeds)
        search = partial(search, bank_features=features, held=held)
        generator = self.scene.generator.fingerprint
        return searched_direction(search, method, generator, on_step, correction)

    # Scores

    def score(
        self,
        target: Target,
        sources: Float[Tensor, "sources 3 height width"],
        edited: Float[Tensor, "sources 3 height width"],
    ) -> Scores:
        """Score edits, through the embedder's own preprocessing whatever the recipe."""
        before, after = map(self.scene.image_features, (sources, edited))
        return score_features(self.embed_target(target), before, after)


def essence_of(
    scene: Scene,
    world: World,
    mapper: str | Path | None = None,
    aligner: Callable[[Image.Image], Image.Image] | None = None,
) -> EssenceTransfer:
    """Join a scene of a world with a mapper, loaded as by `load_mapper`; None: the world's."""
    texts, path, loaded = None, mapper or world.mapper, None
    if world.neutral and isinstance(scene.embedder, TextEmbedder):
        texts = TextTargets(scene.embedder, world.neutral)
    if path is not None:
        prints = scene.generator.fingerprint, scene.embedder.fingerprint
        loaded = load_mapper(path, *prints)[0].to(scene.device)
    recipe = RECIPES[world.recipe]
    return EssenceTransfer(scene, loaded, texts=texts, aligner=aligner, recipe=recipe)


def load_essence(
    world: World | str | Path = DEFAULT_WORLD,
    device: torch.device | str | None = None,
    mapper: str | Path | None = None,
    *,
    max_images: int | None = None,
    checkpoint_layers: bool = False,
) -> EssenceTransfer:
    """Load a world's networks and its mapper, or another mapper.

    Args:
        world: a world, its name or the path of its file.
        device: None: torch's default device.
        max_images, checkpoint_layers: see `load_scene`.

    FileNotFoundError, ValueError: as `load_world`, `load_scene` and `load_mapper`.
    """
    if not isinstance(world, World):
        world = load_world(str(world))
    device = None if device is None else torch.device(device)
    scene = load_scene(world, device, max_images=max_images, checkpoint_layers=checkpoint_layers)
    return essence_of(scene, world, mapper)
