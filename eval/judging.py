"""Judge images of edits by networks, and score them; keep what was seen in pictures.

Knows images, embeddings and readings; nothing of how edits were found. Judges compute in float32,
at the embedder's own preprocessing, whatever precision or recipe made the edits. Their outputs are
on the processor.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.illustrated.codes import SIZE
from data.targets import digest_of, picture_id
from eval.metrics import (
    edit_scores,
    essence_acquired,
    frechet_distance,
    identity_kept,
    outside_alone,
    outside_change,
    perceptual_distance,
    released_score,
    sharpness_kept,
    spread,
)
from eval.reader import AvatarReader, load_reader, seen_identity
from eval.sets import Embeddings, EvalSet, Sources
from eval.truth import Truth
from targetclip import command
from targetclip.embedder import ClipEmbedder, ImageEmbedder
from targetclip.encoders.blip import BlipEmbedder
from targetclip.media.images import picture_to_tensor
from targetclip.scene import Scene
from targetclip.weights import read_tensors, save_tensors
from targetclip.world import World

# Names of the scores, in the order of tables; not every world has all.
SCORES = {
    "transfer": "transfer score",
    "consistency": "consistency",
    "essence": "essence acquired",
    "identity": "identity kept",
    "person": "same person",
    "target_person": "the target's person",
    "second": "second judge",
    "additivity": "additivity",
    "outside": "change outside",
    "perceived": "perceived outside",
    "sharpness": "sharpness kept",
}
RELEASED_STRENGTH = 1.2
BLIP = "blip:"
KEPT_FORMAT = "targetclip-embeddings/1"
AT_ONCE, PIXELS = 64, 2**22  # pictures of KeptEmbeddings that judges see at once, and their pixels
AVATARS = "avatars"  # the world whose pictures the attribute reader knows


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The outputs of all judges for some images; every field has the images' leading axes."""

    embeddings: Float[Tensor, "*images embed"]
    features: Float[Tensor, "*images features"]
    """For FID and KID."""
    readings: Float[Tensor, "*images outputs"] | None
    """Of the attribute reader."""
    second: Float[Tensor, "*images other"] | None
    """Embeddings of the second judge."""
    people: Float[Tensor, "*images identity"] | None
    """Of the identity model."""


def stacked(outputs: Sequence[Outputs]) -> Outputs:
    """Return the outputs for several batches of images as one, with a new first axis."""

    def joined(name: str) -> Any:
        parts = [vars(output)[name] for output in outputs]
        return None if parts[0] is None else torch.stack(parts)

    return Outputs(**{field.name: joined(field.name) for field in fields(Outputs)})


def load_judge(
    name: str | None, pretrained: str | None, device: torch.device
) -> ClipEmbedder | BlipEmbedder | None:
    """Load the second judge, if one is asked for."""
    if name is None:
        return None
    if not name.startswith(BLIP):
        return ClipEmbedder.load(name, pretrained).to(device)
    if pretrained is not None:
        raise ValueError(f"--judge-pretrained: {name} brings its own weights; drop the flag")
    return BlipEmbedder.load(name.removeprefix(BLIP)).to(device)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The models that judge images of a scene: its own, and readers that nothing learns from."""

    scene: Scene
    """Its embedder judges, and its identity model if there is one."""
    reader: AvatarReader | None = None
    """None where no reader knows the world's pictures."""
    second: ImageEmbedder | None = None
    """A second judge of the transfer score."""

    @property
    def features_of(self) -> str:
        """The source of the features of FID and KID: the judge least like what edits optimize."""
        if self.reader is not None:
            return "the attribute reader's penultimate layer"
        return "the second judge's embedding" if self.second else "the embedder's own embedding"

    @torch.no_grad()
    def outputs(self, images: Float[Tensor, "batch 3 height width"]) -> Outputs:
        """Return the outputs of every judge for images in [-1, 1]."""
        identity = self.scene.identity
        embeddings = self.scene.embedder.embed_images(images)
        second = None if self.second is None else self.second.embed_images(images)
        features, readings = embeddings if second is None else second, None
        if self.reader is not None:
            features, readings = self.reader.read(images)

        def kept(output: Tensor | None) -> Tensor | None:
            return None if output is None else output.float().cpu()

        return Outputs(
            embeddings=embeddings.float().cpu(),
            features=features.float().cpu(),
            readings=kept(readings),
            second=kept(second),
            people=kept(None if identity is None else identity.embed_images(images)),
        )

    @torch.no_grad()
    def perceived(
        self,
        before: Float[Tensor, "batch 3 height width"],
        after: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, " batch"] | None:
        """Return the reader's perceptual distance of an edit's change outside; None without one."""
        if self.reader is None:
            return None
        edited = self.reader.levels(outside_alone(before, after))
        return perceptual_distance(self.reader.levels(before), edited)

    @property
    def people_of(self) -> str | None:
        """The source of identity features; None where there is none."""
        if self.scene.identity is not None:
            return "the identity model"
        return None if self.reader is None else "the attribute reader's identity readings"

    @torch.no_grad()
    def people(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch identity"]:
        """Return identity features: the identity model's or, without one, identity readings."""
        if self.scene.identity is not None:
            return self.scene.identity.embed_images(images).float().cpu()
        if self.reader is None:
            raise ValueError("expected an identity model or a reader, found neither")
        readings = self.reader.read(images)[1].cpu()
        return readings * seen_identity(readings)


def reader_of(world: World, device: torch.device) -> AvatarReader | None:
    """Load the attribute reader; None in a world whose pictures it does not know."""
    return load_reader().to(device) if world.name == AVATARS else None


def face_reader(scene: Scene) -> AvatarReader:
    """Return the attribute reader, on a scene's device.
    ValueError: the generator's pictures are not of the size that the reader knows."""
    if scene.generator.resolution != SIZE:
        raise ValueError(
            f"--world: expected a world of avatars of {SIZE} px, which the attribute reader "
            f"knows, found one of {scene.generator.resolution} px"
        )
    return load_reader().to(scene.device)


def face_judges(scene: Scene) -> Judges:
    """Return the embedder and the attribute reader as judges of avatars, for studies.
    ValueError: as `face_reader`."""
    return Judges(scene=scene, reader=face_reader(scene))


@dataclass(frozen=True)
class Goal:
    """The outputs of the judges for targets."""

    embeddings: Embeddings
    second: Float[Tensor, "targets other"] | None
    """Embeddings of the second judge."""
    people: Float[Tensor, "targets identity"] | None
    """Of the identity model."""
    truth: Truth | None
    """Of avatars; None of other pictures."""


def goal_of(judges: Judges, targets: EvalSet) -> Goal:
    """Judge targets, preprocessed as their embedders' own libraries do."""
    pictures, scene = list(targets.pictures), judges.scene
    second = None if judges.second is None else judges.second.embed_pictures(pictures).cpu()
    people = None if scene.identity is None else judges.people(scene.images_of(pictures))
    return Goal(scene.embedder.embed_pictures(pictures).cpu(), second, people, targets.truth)


# Edits


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Edits of sources, judged."""

    before: Outputs
    """For the sources, unedited."""
    after: Outputs
    """For their edits, targets first, then sources."""
    goal: Goal
    scores: Mapping[str, Float[Tensor, " targets"]]
    """Of SCORES, those that there is a judge for: means over sources."""

    def __len__(self) -> int:
        return len(self.goal.embeddings)


def scores_of(before: Outputs, after: Outputs, goal: Goal) -> dict[str, Float[Tensor, " targets"]]:
    """Return the scores that follow from outputs."""
    scores = edit_scores(vars(goal), vars(before), vars(after))
    if after.readings is not None and before.readings is not None:
        scores["identity"] = identity_kept(after.readings, before.readings)
        if (truth := goal.truth) is not None:
            scores["essence"] = essence_acquired(
                after.readings, before.readings, truth.readings, truth.seen
            )
    return scores


def judge(
    judges: Judges,
    goal: Goal,
    before: Float[Tensor, "sources 3 height width"],
    edited: Iterable[Float[Tensor, "sources 3 height width"]],
) -> Judged:
    """Judge images of edited sources, a target of `goal` at a time.

    Args:
        before: images of the sources, unedited.
    """
    outputs, outside, perceived, sharp = [], [], [], []
    for images in edited:
        outputs.append(judges.outputs(images))
        outside.append(outside_change(before, images).mean().cpu())
        sharp.append(sharpness_kept(before, images).nanmean().cpu())
        if (distance := judges.perceived(before, images)) is not None:
            perceived.append(distance.mean().cpu())
    unedited, after = judges.outputs(before), stacked(outputs)
    scores = scores_of(unedited, after, goal)
    scores |= {"outside": torch.stack(outside), "sharpness": torch.stack(sharp)}
    if perceived:
        scores["perceived"] = torch.stack(perceived)
    scores = {name: scores[name] for name in SCORES if name in scores}
    return Judged(before=unedited, after=after, goal=goal, scores=scores)


def edited_images(
    scene: Scene,
    sources: Sources,
    edits: Float[Tensor, "targets *sources num_ws w_dim"],
    strength: float = 1.0,
) -> Iterator[Float[Tensor, "sources 3 height width"]]:
    """Yield images of the edited sources, a target at a time."""
    for edit in edits.to(sources.device):
        yield scene.edit(sources, edit, strength)


def judge_edits(
    judges: Judges,
    goal: Goal,
    sources: Sources,
    edits: Float[Tensor, "targets *sources num_ws w_dim"],
    strength: float = 1.0,
) -> Judged:
    """Judge edits of sources: for each target a direction, or an offset for each source."""
    before = judges.scene.render(sources)
    return judge(judges, goal, before, edited_images(judges.scene, sources, edits, strength))


def study_means(scores: Mapping[str, Float[Tensor, " targets"]]) -> dict[str, float]:
    """Return means over the targets of `study_set`, of which every second one is in range."""
    transfer, essence = scores["transfer"], scores["essence"]
    means = {
        "transfer": transfer,
        "transfer_in_range": transfer[::2],
        "transfer_out_of_range": transfer[1::2],
        "consistency": scores["consistency"],
        "essence_in_range": essence[::2],
        "essence_out_of_range": essence[1::2],
        "identity": scores["identity"],
    }
    return {name: float(values.mean()) for name, values in means.items()}


# The released evaluation


def released_scores(
    judges: Judges,
    sources: Sources,
    edits: Float[Tensor, "targets *sources num_ws w_dim"],
    targets: EvalSet,
    references: Float[Tensor, "images features"] | None,
    seen: Callable[[int, Tensor], None] = lambda place, images: None,
) -> dict[str, dict[str, float]]:
    """Score edits by the released evaluation, with its fault and without (see `spread`).

    Strength 1.2 for all; every score is a mean over sources, then mean and deviation over targets.
    `identity_released` repeats the fault: the identity model sees sources in [-1, 1], as it
    expects, and results in [0, 1]. `identity` and `target_identity` show it all in [-1, 1].
    Identity readings, where they stand in for such a model, are centred on the sources' mean.
    `fid` is each target's, of its results against `references`; left out without any.

    Args:
        seen: called with the place of each target and its results, [sources, 3, height, width].
    """
    goal, scene = goal_of(judges, targets), judges.scene
    outputs, results, faulty = [], [], []
    for place, images in enumerate(edited_images(scene, sources, edits, RELEASED_STRENGTH)):
        seen(place, images)
        outputs.append(judges.outputs(images))
        if judges.people_of is not None:
            clamped = images.clamp(-1, 1)
            results.append(judges.people(clamped))
            faulty.append(judges.people(clamped / 2 + 0.5))
    after = stacked(outputs)
    scores = {"semantic": released_score(after.embeddings, goal.embeddings[:, None])}
    if after.second is not None and goal.second is not None:
        scores["second"] = released_score(after.second, goal.second[:, None])
    if judges.people_of is not None:
        people_of_targets = judges.people(scene.images_of(targets.pictures))
        before = judges.people(scene.render(sources).clamp(-1, 1))
        centre = before.mean(dim=0) if scene.identity is None else torch.zeros(())
        kept, spoilt = torch.stack(results) - centre, torch.stack(faulty) - centre
        scores["identity_released"] = released_score(spoilt, (before - centre)[None])
        scores["identity"] = released_score(kept, (before - centre)[None])
        scores["target_identity"] = released_score(kept, (people_of_targets - centre)[:, None])
    if references is not None:
        distances = [frechet_distance(rows, references) for rows in after.features]
        scores["fid"] = spread(torch.tensor(distances))
    return scores


# What judges saw, kept


class KeptEmbeddings:
    """What judges see in pictures, kept in a folder by the pictures' content, as it is made.

    Args:
        judges: models with `embed_images` and a `fingerprint`, by their names.
    """

    def __init__(self, folder: Path, judges: Mapping[str, Any], device: torch.device) -> None:
        self.folder, self.judges, self.device = folder, judges, device
        self.rows: dict[str, Tensor] = {}
        self.waiting: dict[int, dict[str, Tensor]] = defaultdict(dict)
        """Images to be judged, by side and id."""
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.safetensors"):
            try:
                self.rows |= read_tensors(path, "embeddings", [KEPT_FORMAT], "delete it")[1]
            except ValueError as error:
                command.say(f"embeddings made again: {command.one_line(error)}", error=True)

    def key(self, judge: str, name: str) -> str:
        return f"{self.judges[judge].fingerprint} {name}"

    def add(self, picture: Image.Image) -> str:
        """Take a picture; return its id."""
        name, side = picture_id(picture), min(picture.size)
        waiting = self.waiting[side]
        if any(self.key(judge, name) not in self.rows for judge in self.judges):
            waiting[name] = picture_to_tensor(picture, side)[0]
        if len(waiting) >= min(AT_ONCE, PIXELS // side**2):
            self.judge(side)
        return name

    @torch.no_grad()
    def judge(self, side: int) -> None:
        """Judge the pictures of a size that wait, and keep what is seen."""
        images = self.waiting.pop(side, {})
        made: dict[str, Tensor] = {}
        for judge, model in self.judges.items():
            names = [name for name in images if self.key(judge, name) not in self.rows]
            if names:
                batch = torch.stack([images[name] for name in names]).to(self.device)
                seen = model.embed_images(batch).float().cpu()
                made |= {self.key(judge, n): row for n, row in zip(names, seen, strict=True)}
        if made:
            path = self.folder / f"{digest_of(*made)[:16]}.safetensors"
            save_tensors(path, made, {"format": KEPT_FORMAT})
            self.rows |= made

    def finish(self) -> None:
        """Judge all that still waits."""
        for side in list(self.waiting):
            self.judge(side)

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of pictures, [pictures, features], by the names of judges."""
        return {
            judge: torch.stack([self.rows[self.key(judge, name)] for name in names])
            for judge in self.judges
        }
