"""Edits for the `targetclip` command: sources moved along a direction, written and scored.

Pictures are rendered, written and forgotten lot by lot, so that a thousand sources need no more
memory than a few. Knows nothing of how directions are found.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from predictor.cli.console import Console
from predictor.cli.options import Request
from predictor.cli.output import OutputFolder
from predictor.cli.report import (
    NamedTarget,
    Outcome,
    score_facts,
    target_facts,
)
from predictor.cli.sources import (
    MAX_SHOWN,
    Latents,
    Sources,
)
from predictor.direction import Direction, layer_weights
from predictor.transfer import EssenceTransfer
from targetclip.command import (
    Stopwatch,
)
from targetclip.media.images import tensor_to_pictures
from targetclip.scene import MAX_IMAGES, Scene, Scores, score_features


def features_of(
    scene: Scene, images: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images features"]:
    """Return the features of images by which edits are scored."""
    with torch.no_grad():
        model = scene.feature_model(float(scene.identity is not None))
        return model.embed_images(images, "consistent")


def scores_of(
    embedding: Float[Tensor, " embed"],
    before: Float[Tensor, "sources features"],
    after: Float[Tensor, "sources features"],
) -> Scores:
    """Return the scores of the edits for one target."""
    scores = score_features(embedding[None], before[None], after[None])
    return Scores(
        target_before=scores.target_before[0],
        target_after=scores.target_after[0],
        source_after=scores.source_after[0],
        consistency=scores.consistency[0],
        identity=None if scores.identity is None else scores.identity[0],
    )


def lots_of(
    scene: Scene, ws: Float[Tensor, "sources num_ws w_dim"]
) -> Iterator[Float[Tensor, "lot num_ws w_dim"]]:
    """Return latents in lots that are rendered at once."""
    return (lot.to(scene.device) for lot in ws.split(scene.max_images or MAX_IMAGES))


@dataclass(frozen=True, kw_only=True)
class Edited:
    """The edits of the sources along one direction."""

    facts: dict[str, Any]
    """Entries of report.json."""
    shown: list[Image.Image]
    """Pictures for the sheet."""
    scores: list[Scores]
    """Of each target."""


@dataclass(frozen=True, kw_only=True)
class Editor:
    """The sources of a run, ready to be edited along any direction."""

    essence: EssenceTransfer
    sources: Sources
    latents: Latents
    before: Float[Tensor, "sources features"]
    """Features of the unedited sources."""
    request: Request
    console: Console
    watch: Stopwatch

    def strength(self, direction: Direction) -> float:
        """Return the strength: the requested one, or as much of it as the identity floor leaves."""
        highest, floor = self.request.strength, self.request.identity_floor
        if floor is None:
            return highest
        scored = self.latents.scored[:MAX_SHOWN]
        strength = self.essence.strength_at_identity(scored, direction, floor, highest)
        self.console.result(f"strength {strength:.3g}, by --identity-floor {floor:g}")
        if strength == highest:
            self.console.warn(
                f"--identity-floor {floor:g} has no effect: sources keep more than that at "
                f"strength {highest:.3g}"
            )
        elif strength == 0:
            self.console.warn(
                f"--identity-floor {floor:g}: no strength above 0 keeps that; sources are unedited"
            )
        return strength

    def edit(self, out: OutputFolder, targets: Sequence[NamedTarget], outcome: Outcome) -> Edited:
        """Edit the sources, write their pictures, and score them."""
        scene, latents = self.essence.scene, self.latents
        with self.watch.phase("edit"):
            factors = layer_weights(scene.generator.num_ws, **self.request.layers)
            direction = outcome.direction.weighted(factors)
            if latents.whole is not None:
                direction = direction.for_clip(latents.whole)
            strength = self.strength(direction)
        features: list[Tensor] = []
        shown: list[Image.Image] = []

        def edits(ws: Float[Tensor, "sources num_ws w_dim"]) -> Iterator[Image.Image]:
            for lot in lots_of(scene, ws):
                yield from tensor_to_pictures(self.essence.edit(lot, direction, strength))

        def scored() -> Iterator[Image.Image]:
            places = {*latents.shown}
            for lot in lots_of(scene, latents.scored):
                images = self.essence.edit(lot, direction, strength)
                start = sum(map(len, features))
                features.append(features_of(scene, images))
                for place, picture in enumerate(tensor_to_pictures(images), start):
                    if place in places:
                        shown.append(picture)
                    yield picture

        with self.watch.phase("write"):
            pictures = scored()
            if self.request.clip is not None:  # these few frames are scored, all are written
                pictures = iter([*pictures])
            written = self.sources.write(out, pictures, latents, edits)
        with self.watch.phase("score"):
            after = torch.cat(features)
            embeddings = [self.essence.embed_target(target.content) for target in targets]
            scores = [scores_of(embedding, self.before, after) for embedding in embeddings]
        rows = target_facts(targets, outcome)
        for row, its in zip(rows, scores, strict=True):
            row["scores"] = score_facts(its)
        facts = {"strength": strength, "targets": rows, **written}
        return Edited(facts=facts, shown=shown, scores=scores)


def open_editor(
    essence: EssenceTransfer,
    sources: Sources,
    request: Request,
    console: Console,
    watch: Stopwatch,
) -> Editor:
    """Invert or generate the sources."""
    scene = essence.scene
    with watch.phase("sources"):
        latents = sources.latents(scene)
        lots = lots_of(scene, latents.scored)
        before = torch.cat([features_of(scene, scene.render(lot)) for lot in lots])
    return Editor(
        essence=essence,
        sources=sources,
        latents=latents,
        before=before,
        request=request,
        console=console,
        watch=watch,
    )
