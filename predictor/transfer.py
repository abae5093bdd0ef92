"""EssenceTransfer: a target picture in, a direction out, edits of any source.

Knows how the parts work together: embedder, generator, inverter and optimizer, all passed in.
Every direction says which method made it. Files and printing are the command line's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from targetclip.editing import Scores, apply_direction, render, score_edit
from targetclip.embedder import ImageEmbedder
from targetclip.generators import Generator
from targetclip.inverter import LatentInverter
from targetclip.optimize import Optimized, Progress, optimize_directions
from targetclip.recipes import Initial, Recipe
from targetclip.sources import BANK, generated_sources, seed_of, source_bank
from targetclip.targets import embed_targets, initial_directions, invert


@dataclass(frozen=True)
class Direction:
    """A direction and how it was found."""

    vector: Float[Tensor, "num_ws w_dim"]
    method: str
    """What made it: "optimizer", or what its file says."""
    transfer: float
    """Transfer score on the method's own sources at the end: mean cosine to the target."""
    consistency: float
    """1 - consistency loss there."""
    steps: int


class EssenceTransfer:
    """Gives sources a target's essence.

    Args:
        generator, embedder: any that keep the protocols.
        inverter: from pictures to latents; None where there is none.
        truncation: of generated sources; 1 is the generator's full variety.
        max_images: rendered at once; bounds memory.
    """

    def __init__(
        self,
        generator: Generator,
        embedder: ImageEmbedder,
        inverter: LatentInverter | None = None,
        truncation: float = 0.7,
        max_images: int = 64,
    ) -> None:
        self.generator = generator
        self.embedder = embedder
        self.inverter = inverter
        self.truncation = truncation
        self.max_images = max_images

    def invert(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "sources num_ws w_dim"]:
        """Latents of pictures.

        Raises:
            ValueError: there is no inverter.
        """
        return invert(self.generator, self.inverter, pictures)

    def generated_sources(self, count: int, seed: int = 0) -> Float[Tensor, "sources num_ws w_dim"]:
        """Latents of the generator's own samples; source i of a seed is always the same."""
        return generated_sources(self.generator, self.truncation, count, seed)

    def embed_target(self, target: Image.Image, recipe: Recipe) -> Float[Tensor, " embed"]:
        """Raw embedding of a target picture, preprocessed as a recipe wants it."""
        return embed_targets(self.generator, self.embedder, [target], recipe)[0]

    def initial(
        self, target: Image.Image, kind: Initial, seed: int
    ) -> Float[Tensor, "num_ws w_dim"]:
        """What an optimization starts from (release: absolute latents, not offsets)."""
        seeds = [seed_of("initial", seed)]
        return initial_directions(self.generator, self.inverter, [target], kind, seeds)[0]

    def optimize(
        self,
        target: Image.Image,
        recipe: Recipe,
        seed: int = 0,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Direction:
        """Find a direction by the iterative optimizer.

        Raises:
            ValueError: the recipe needs an inverter and there is none.
            FloatingPointError: the loss stopped being finite.
        """
        count = BANK if recipe.fresh_sources else recipe.sources
        bank = source_bank(self.generator, self.truncation, count)
        found = optimize_directions(
            self.generator,
            self.embedder,
            self.embed_target(target, recipe)[None],
            bank,
            recipe,
            self.initial(target, recipe.initial, seed)[None],
            [seed_of("target", seed)],
            on_step,
            self.max_images,
        )
        if found.failures[0] is not None:
            raise FloatingPointError(f"no direction found: {found.failures[0]}")
        return optimizer_direction(found)

    def edit(
        self,
        source_ws: Float[Tensor, "sources num_ws w_dim"],
        direction: Float[Tensor, "num_ws w_dim"],
        strength: float = 1.0,
    ) -> Float[Tensor, "sources 3 height width"]:
        """Render sources moved along a direction: images in [-1, 1]."""
        edited = apply_direction(source_ws, direction, strength)
        return render(self.generator, edited, self.max_images)

    def score(
        self,
        target: Image.Image,
        sources: Float[Tensor, "sources 3 height width"],
        edited: Float[Tensor, "sources 3 height width"],
    ) -> Scores:
        """Score edits; always through the embedder's own preprocessing, whatever the recipe."""
        embedding = self.embedder.embed_pictures([target])[0]
        return score_edit(self.embedder, embedding, sources, edited, max_images=self.max_images)


def optimizer_direction(found: Optimized) -> Direction:
    """The only target's row of an optimization."""
    return Direction(
        vector=found.directions[0],
        method="optimizer",
        transfer=1 - float(found.transfer[0]),
        consistency=1 - float(found.consistency[0]),
        steps=int(found.steps[0]),
    )
