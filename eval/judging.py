"""The judges: from images of edits to what every judge makes of them, and to scores.

Knows networks that look at images; nothing of how edits were found. Everything is in float32, at
the embedder's own preprocessing, whatever precision or recipe made the edits. What is kept of
images is on the processor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from data.drawn.sketch import SIZE
from eval.metrics import (
    Spread,
    additivity,
    essence_acquired,
    frechet_distance,
    identity_kept,
    outside_alone,
    outside_change,
    perceptual_distance,
    reading_columns,
    released_score,
    transfer_scores,
)
from eval.reader import AttributeReader, load_reader
from eval.sets import EvalSet, Truth
from targetclip.editing import render
from targetclip.embedder import ImageEmbedder
from targetclip.encoders.identity import IdentityModel
from targetclip.generators import Generator
from targetclip.losses import consistency_loss
from targetclip.media.images import picture_to_tensor
from targetclip.scene import Scene

# What each score is, in the order of tables; not every world has all.
SCORES = {
    "transfer": "transfer score",
    "consistency": "consistency",
    "essence": "essence acquired",
    "identity": "identity kept",
    "person": "same person",
    "second": "second judge",
    "additivity": "additivity",
    "outside": "change outside",
    "perceived": "perceived outside",
}
RELEASED_STRENGTH = 1.2


@dataclass(frozen=True)
class Look:
    """What the judges make of images; every field has the images' leading axes."""

    embeddings: Float[Tensor, "*images embed"]
    features: Float[Tensor, "*images features"]
    """For FID and KID."""
    readings: Float[Tensor, "*images outputs"] | None
    second: Float[Tensor, "*images other"] | None
    """Embeddings of a second judge."""
    people: Float[Tensor, "*images identity"] | None
    """Of the identity model."""


def stacked(looks: Sequence[Look]) -> Look:
    """Looks at several batches of images, under a new first axis."""

    def joined(name: str) -> Tensor | None:
        parts = [value for look in looks if (value := vars(look)[name]) is not None]
        return torch.stack(parts) if parts else None

    return Look(**{field.name: joined(field.name) for field in fields(Look)})  # type: ignore[arg-type]


def seen_by_level(
    reader: AttributeReader, images: Float[Tensor, "batch 3 height width"]
) -> list[Float[Tensor, "batch _ _ _"]]:
    """What each level of the reader's convolutions says of every place."""
    levels = [images.clamp(-1, 1)]
    for conv in reader.encoder.convs:
        levels.append(conv(levels[-1]))
    return levels[1:]


def read(
    reader: AttributeReader, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch outputs"]]:
    """The reader's penultimate layer, and its readings."""
    encoder, last = reader.encoder, seen_by_level(reader, images)[-1]
    features = F.leaky_relu(encoder.hidden(last.flatten(1)), 0.2)
    return features, torch.sigmoid(encoder.out(features))


@dataclass(frozen=True)
class Judges:
    """Everything that looks at images, and the generator that makes them."""

    generator: Generator
    embedder: ImageEmbedder
    reader: AttributeReader | None
    """None where no reader knows the world's pictures."""
    second: ImageEmbedder | None
    identity: IdentityModel | None
    max_images: int

    @property
    def features_of(self) -> str:
        """What FID and KID look at: the judge that is least like what edits are optimized for."""
        if self.reader is not None:
            return "the attribute reader's penultimate layer"
        return "the second judge's embedding" if self.second else "the embedder's own embedding"

    @torch.no_grad()
    def look(self, images: Float[Tensor, "batch 3 height width"]) -> Look:
        """What every judge makes of images in [-1, 1]."""
        embeddings = self.embedder.embed_images(images)
        second = None if self.second is None else self.second.embed_images(images)
        features, readings = embeddings if second is None else second, None
        if self.reader is not None:
            features, readings = read(self.reader, images)
        people = None if self.identity is None else self.identity.embed_images(images)
        found = (embeddings, features, readings, second, people)
        return Look(*(None if each is None else each.float().cpu() for each in found))  # type: ignore[arg-type]

    @torch.no_grad()
    def perceived(
        self,
        before: Float[Tensor, "batch 3 height width"],
        after: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"] | None:
        """How much an edit's change outside is seen by the reader; None where there is none."""
        if self.reader is None:
            return None
        kept = seen_by_level(self.reader, before)
        changed = seen_by_level(self.reader, outside_alone(before, after))
        return perceptual_distance(kept, changed)

    @property
    def people_of(self) -> str | None:
        """What says who is on an image; None where nothing does."""
        if self.identity is not None:
            return "the identity model"
        return None if self.reader is None else "the attribute reader's identity readings"

    @torch.no_grad()
    def people(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch identity"]:
        """Who is on images: of the identity model or, where there is none, identity readings.

        Raises:
            ValueError: there is neither.
        """
        if self.identity is not None:
            return self.identity.embed_images(images).float().cpu()
        if self.reader is None:
            raise ValueError("expected an identity model or a reader, found neither")
        readings: Tensor = self.reader(images).float().cpu()
        return readings[:, reading_columns(essence=False)]

    def render(
        self, ws: Float[Tensor, "sources num_ws w_dim"]
    ) -> Float[Tensor, "sources 3 height width"]:
        return render(self.generator, ws, self.max_images)


@dataclass(frozen=True)
class Goal:
    """What targets are to the judges."""

    embeddings: Float[Tensor, "targets embed"]
    second: Float[Tensor, "targets other"] | None
    truth: Truth | None


def goal_of(judges: Judges, targets: EvalSet) -> Goal:
    """Targets as their embedders' own libraries see them."""
    pictures = list(targets.pictures)
    second = None if judges.second is None else judges.second.embed_pictures(pictures).cpu()
    return Goal(judges.embedder.embed_pictures(pictures).cpu(), second, targets.truth)


@dataclass(frozen=True)
class Judged:
    """What the judges make of edits, targets first, then sources."""

    look: Look
    outside: Float[Tensor, " targets"]
    """Change outside of the edit."""
    perceived: Float[Tensor, " targets"] | None
    """The same as a network sees it; None where no network knows such pictures."""


def edited_images(
    judges: Judges,
    sources: Float[Tensor, "sources num_ws w_dim"],
    edits: Float[Tensor, "targets *sources num_ws w_dim"],
    strength: float = 1.0,
) -> Iterable[Float[Tensor, "sources 3 height width"]]:
    """Edited sources, a target at a time."""
    for edit in edits.to(sources.device):
        yield judges.render(sources + strength * edit)


def judge(
    judges: Judges,
    before: Float[Tensor, "sources 3 height width"],
    edited: Iterable[Float[Tensor, "sources 3 height width"]],
) -> Judged:
    """Look at edited sources, a target at a time."""
    looks, outside, perceived = [], [], []
    for images in edited:
        looks.append(judges.look(images))
        outside.append(outside_change(before, images).mean().cpu())
        if (seen := judges.perceived(before, images)) is not None:
            perceived.append(seen.mean().cpu())
    shown = torch.stack(perceived) if perceived else None
    return Judged(stacked(looks), torch.stack(outside), shown)


def scores_of(judged: Judged, before: Look, goal: Goal) -> dict[str, Tensor]:
    """Every score of SCORES that there is a judge for, each [targets]: means over sources."""
    look = judged.look
    unedited = before.embeddings.expand_as(look.embeddings)
    scores = {
        "transfer": transfer_scores(look.embeddings, goal.embeddings).mean(dim=1),
        "consistency": 1 - consistency_loss(unedited, look.embeddings, "unit"),
        "additivity": additivity(before.embeddings, look.embeddings),
        "outside": judged.outside,
    }
    if judged.perceived is not None:
        scores["perceived"] = judged.perceived
    if look.readings is not None and before.readings is not None:
        scores["identity"] = identity_kept(look.readings, before.readings)
        if (truth := goal.truth) is not None:
            known = (truth.readings, truth.seen)
            scores["essence"] = essence_acquired(look.readings, before.readings, *known)
    if look.second is not None and goal.second is not None:
        scores["second"] = transfer_scores(look.second, goal.second).mean(dim=1)
    if look.people is not None and before.people is not None:
        scores["person"] = F.cosine_similarity(look.people, before.people, dim=-1).mean(dim=1)
    return {name: scores[name] for name in SCORES if name in scores}


# The released evaluation


def released_scores(
    judges: Judges,
    sources: Float[Tensor, "sources num_ws w_dim"],
    edits: Float[Tensor, "targets num_ws w_dim"],
    targets: EvalSet,
    references: Float[Tensor, "images features"],
) -> dict[str, Spread]:
    """What the released evaluation says of directions, and what it would say without its fault.

    Strength 1.2 for all; every score is a mean over sources, then mean and deviation over targets.
    `identity_released` repeats the fault: the identity model is shown sources in [-1, 1], as it
    expects, and results in [0, 1]. `identity` and `target_identity` show it all alike. Where
    identity readings stand in for such a model they are taken from the mean of the sources'.
    `fid` is each target's, of its results against `references`.
    """
    goal = goal_of(judges, targets)
    looks, results, faulty = [], [], []
    for images in edited_images(judges, sources, edits, RELEASED_STRENGTH):
        looks.append(judges.look(images))
        if judges.people_of is not None:
            shown = images.clamp(-1, 1)
            results.append(judges.people(shown))
            faulty.append(judges.people(shown / 2 + 0.5))
    look = stacked(looks)
    scores = {"semantic": released_score(look.embeddings, goal.embeddings[:, None])}
    if look.second is not None and goal.second is not None:
        scores["second"] = released_score(look.second, goal.second[:, None])
    if judges.people_of is not None:
        size = judges.generator.resolution
        pictures = torch.cat([picture_to_tensor(picture, size) for picture in targets.pictures])
        wanted = judges.people(pictures.to(sources.device))
        before = judges.people(judges.render(sources).clamp(-1, 1))
        centre = before.mean(dim=0) if judges.identity is None else torch.zeros(())
        kept, spoilt = torch.stack(results) - centre, torch.stack(faulty) - centre
        scores["identity_released"] = released_score(spoilt, (before - centre)[None])
        scores["identity"] = released_score(kept, (before - centre)[None])
        scores["target_identity"] = released_score(kept, (wanted - centre)[:, None])
    distances = torch.tensor([frechet_distance(each, references) for each in look.features])
    deviation = float(distances.std(correction=0))
    return scores | {"fid": Spread(float(distances.mean()), deviation)}


# Of the studies


def face_judges(scene: Scene) -> Judges:
    """Return the embedder and the attribute reader as judges of drawn faces.

    Raises:
        ValueError: the generator's pictures are not of the size that the reader knows.
    """
    if scene.generator.resolution != SIZE:
        raise ValueError(
            f"--world: expected a world of drawn faces of {SIZE} px, which the attribute reader "
            f"knows, found one of {scene.generator.resolution} px"
        )
    return Judges(scene=scene, reader=load_reader().to(scene.device), second=None)
