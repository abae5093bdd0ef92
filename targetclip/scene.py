"""Scene: the frozen networks of a world, and the verbs that use them.

Everything else holds a Scene: the product is a Scene and a mapper, a worker of a build is a Scene
and a folder, judges are a Scene and readers. Knows latents, directions, embeddings and scores;
nothing of files, commands or mappers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from targetclip.embedder import EmbedsImages, ImageEmbedder, embed_latents
from targetclip.encoders.identity import IdentityModel, feature_model
from targetclip.encoders.inverter import LatentInverter
from targetclip.generators import Generator
from targetclip.media.images import picture_to_tensor
from targetclip.optimize import Optimized, Progress, optimize_directions
from targetclip.recipes import Differences, Initial, Preprocess, Recipe
from targetclip.scores import Scores, score_features
from targetclip.seeds import BANK, BANK_SEED, source_seeds

MAX_IMAGES = 64  # rendered at once without gradients, where nobody says how many, up to LARGEST
LARGEST = 256  # px; of larger images fewer: 64 of 1024 px need more than 24 GiB


def random_latents(
    generator: Generator, seeds: Sequence[int], truncation: float = 0.7
) -> Float[Tensor, "batch num_ws w_dim"]:
    """Return one truncated latent for each seed, whatever the order or number of the seeds."""
    z = torch.stack(
        [torch.randn(generator.z_dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    with torch.no_grad():
        return generator.mapping(z.to(generator.mean_w.device), truncation)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The frozen networks of a world, on one device."""

    generator: Generator
    embedder: ImageEmbedder
    inverter: LatentInverter | None = None
    """From pictures to latents; None where there is none."""
    identity: IdentityModel | None = None
    """Says who is on an image; None where there is none."""
    truncation: float = 0.7
    """Of generated sources: 1 is the generator's full variety."""
    max_images: int | None = None
    """Images rendered at once. None: `at_once`, or all of a step that needs gradients."""
    graphs: bool = True
    """Replay steps of a search as CUDA graphs, where the device has them."""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.generator.mean_w.device

    @property
    def at_once(self) -> int:
        """Images rendered at once without gradients: `max_images`, or as many as take the memory of
        MAX_IMAGES of LARGEST px."""
        larger = max(1, self.generator.resolution // LARGEST)
        return self.max_images or max(1, MAX_IMAGES // larger**2)

    # Sources

    def latents(self, seeds: Sequence[int]) -> Float[Tensor, "sources num_ws w_dim"]:
        """Return one source for each seed."""
        return random_latents(self.generator, seeds, self.truncation)

    def sources(self, count: int, seed: int = 0) -> Float[Tensor, "sources num_ws w_dim"]:
        """Return generated sources, none of which is in the bank; source i of a seed is always the
        same."""
        return self.latents(source_seeds(seed, count))

    def bank(self, count: int = BANK) -> Float[Tensor, "bank num_ws w_dim"]:
        """Return the first sources of the bank, on which directions are optimized."""
        return self.latents(range(BANK_SEED, BANK_SEED + count))

    def bank_of(self, recipe: Recipe) -> Float[Tensor, "bank num_ws w_dim"]:
        """Return the sources that a recipe draws from."""
        return self.bank(BANK if recipe.fresh_sources else recipe.sources)

    def images_of(
        self, pictures: Sequence[Image.Image]
    ) -> Float[Tensor, "pictures 3 height width"]:
        """Return RGB pictures at the generator's size, as images in [-1, 1]."""
        size = self.generator.resolution
        return torch.cat([picture_to_tensor(p, size) for p in pictures]).to(self.device)

    @torch.no_grad()
    def invert(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "pictures num_ws w_dim"]:
        """Return the latents of RGB pictures. ValueError: there is no inverter."""
        if self.inverter is None:
            raise ValueError(
                "this world has no inverter, so pictures have no latents: "
                "use generated sources, and a recipe that does not invert"
            )
        return self.inverter(self.images_of(pictures))

    # Targets

    def embed_targets(
        self, pictures: Sequence[Image.Image], recipe: Recipe
    ) -> Float[Tensor, "targets embed"]:
        """Return raw embeddings of RGB target pictures, preprocessed as the recipe wants them."""
        if recipe.target_preprocess == "encoder":
            return self.embedder.embed_pictures(pictures)
        with torch.no_grad():
            return self.embedder.embed_images(self.images_of(pictures), recipe.preprocess)

    def initial(
        self, pictures: Sequence[Image.Image], kind: Initial, seeds: Sequence[int]
    ) -> Float[Tensor, "targets num_ws w_dim"]:
        """Return where searches start, one seed a target (release: absolute latents, not offsets).
        ValueError: the inversion is wanted and there is no inverter."""
        if kind == "inversion":
            return self.invert(pictures)
        if kind == "random":
            return random_latents(self.generator, seeds)
        zero = torch.zeros_like(self.generator.mean_w)
        return zero.repeat(len(pictures), self.generator.num_ws, 1)

    # Embeddings of renderings

    def feature_model(self, identity_weight: float) -> EmbedsImages:
        """Return the embedder, joined with the identity model where that has a weight.
        ValueError: it has a weight, and there is no identity model."""
        return feature_model(self.embedder, self.identity, identity_weight)

    def features(
        self,
        ws: Float[Tensor, "images num_ws w_dim"],
        preprocess: Preprocess = "consistent",
        identity_weight: float = 0.0,
        render_size: int | None = None,
    ) -> Float[Tensor, "images features"]:
        """Return what `feature_model` makes of renderings; differentiable.
        ValueError: as `feature_model`; the generator has no such `render_size`."""
        at_once = self.max_images or (len(ws) if ws.requires_grad else self.at_once)
        model = self.feature_model(identity_weight)
        return embed_latents(self.generator, model, ws, preprocess, at_once, render_size)

    # Searching

    def search(
        self,
        embeddings: Float[Tensor, "targets embed"],
        recipe: Recipe,
        initial: Float[Tensor, "targets num_ws w_dim"],
        seeds: Sequence[int],
        *,
        bank: Float[Tensor, "bank num_ws w_dim"] | None = None,
        bank_features: Float[Tensor, "bank features"] | None = None,
        held: Float[Tensor, "targets bank num_ws w_dim"] | None = None,
        on_step: Callable[[Progress], None] | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> Optimized:
        """Find the directions of targets by the optimizer; see `optimize_directions`. Sources to
        edit are by default those of `bank_of`."""
        return optimize_directions(
            self.generator,
            self.embedder,
            embeddings,
            self.bank_of(recipe) if bank is None else bank,
            recipe,
            initial,
            seeds,
            on_step=on_step,
            max_images=self.max_images or len(embeddings) * recipe.sources,
            resume=resume,
            bank_features=bank_features,
            identity=self.identity,
            held=held,
            graphs=self.graphs,
        )

    # Editing and scoring

    @torch.no_grad()
    def render(
        self, ws: Float[Tensor, "images num_ws w_dim"]
    ) -> Float[Tensor, "images 3 height width"]:
        """Return images in [-1, 1] of latents, without gradients."""
        parts = ws.split(self.at_once)
        return torch.cat([self.generator.synthesis(part) for part in parts])

    def edit(
        self,
        sources: Float[Tensor, "sources num_ws w_dim"],
        direction: Float[Tensor, "*sources num_ws w_dim"],
        strength: float = 1.0,
    ) -> Float[Tensor, "sources 3 height width"]:
        """Return images in [-1, 1] of sources moved along a direction, one for all or an offset for
        each: w + strength b. ValueError: the direction is not of this generator's W+."""
        if direction.shape[-2:] != sources.shape[1:]:
            raise ValueError(
                f"expected a direction of shape {list(sources.shape[1:])}, found "
                f"{list(direction.shape)}: it belongs to another generator"
            )
        return self.render(sources + strength * direction)

    @torch.no_grad()
    def score(
        self,
        targets: Float[Tensor, "targets embed"],
        sources: Float[Tensor, "*targets sources num_ws w_dim"],
        edits: Float[Tensor, "targets *sources num_ws w_dim"],
        *,
        preprocess: Preprocess = "consistent",
        differences: Differences = "unit",
        with_identity: bool = False,
    ) -> Scores:
        """Edit sources, and score each target's edits. Rows of a batch never meet.

        Args:
            targets: embeddings, raw or unit.
            sources: the same for all targets, or some for each.
            edits: a direction for each target, or an offset for each of its sources.
            preprocess: how images reach the embedder; scores are comparable within one.
            with_identity: score by the identity model as well, if there is one.
        """
        weight = float(with_identity and self.identity is not None)

        def look(ws: Tensor) -> Tensor:
            features = self.features(ws.flatten(0, -3), preprocess, weight)
            return features.reshape(*ws.shape[:-2], -1)

        per_source = edits if edits.ndim == 4 else edits[:, None]
        after = look(sources + per_source)
        return score_features(targets, look(sources).expand_as(after), after, differences)

    @torch.no_grad()
    def image_features(
        self, images: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images features"]:
        """Return embeddings of images, then identity features if there is an identity model."""
        model = self.feature_model(float(self.identity is not None))
        parts = images.split(self.at_once)
        return torch.cat([model.embed_images(part, "consistent") for part in parts])
