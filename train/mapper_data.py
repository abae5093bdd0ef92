"""What the mapper learns from, and what it is judged on: targets, sources, pairs and their units.

Knows pictures, pairs and latents, and which of them may be trained on; nothing of losses or of the
training.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.card import SUMS
from data.dataset import check_made_for, load_pairs, recipe_of
from data.publish import sha256_of
from data.targets import (
    BadTarget,
    Target,
    TargetSet,
    digest_of,
    open_targets,
    split_of,
)
from predictor.editing import edits_sheet
from predictor.mapper import Mapper, Prediction
from targetclip.command import whole_file
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.seeds import VALIDATION_SOURCES, seed_of
from train.mapper_batches import inverted

logger = logging.getLogger(__name__)

EMBED_BATCH = 256
LATENTS = 4096  # drawn to measure how far they spread
EIGEN_FLOOR = 0.01  # of the mean variance: what hardly varies is noise
FLOOR = 0.05  # of the mean deviation: what hardly varies must not become the loudest coordinate
SOURCES = 16  # to validate on
SHOWN = 8  # targets in the picture, of each kind, and sources + 1
IN_RANGE = ("avataaars:", "generated:", "mixed:")  # what the bundled generator can show


def embed_unit(
    scene: Scene, pictures: Sequence[Image.Image], recipe: Recipe
) -> Float[Tensor, "targets embed"]:
    """Return unit embeddings of target pictures, preprocessed as the recipe wants them."""
    return F.normalize(scene.embed_targets(pictures, recipe), dim=1)


def settings_of_scene(scene: Scene, recipe: Recipe) -> dict[str, Any]:
    """Return what of the networks and the recipe decides a training's weights, in plain values."""
    uses_identity = scene.identity is not None and recipe.identity_weight
    return {
        "generator": scene.generator.fingerprint,
        "embedder": scene.embedder.fingerprint,
        "identity": scene.identity.fingerprint if scene.identity and uses_identity else None,
        "truncation": scene.truncation,
        "recipe": asdict(recipe),
    }


# Targets


def training_pictures(
    sets: Sequence[TargetSet], left_out: Set[str], label: str
) -> Iterator[Image.Image]:
    """Yield the pictures of the train split, by their ids, that are not in `left_out`.
    ValueError: at the end, if there was none."""
    good = bad = held_out = 0
    with tqdm(desc=label, total=sum(map(len, sets)), unit="target") as bar:
        for target in (target for targets in sets for target in targets):
            bar.update()
            if isinstance(target, BadTarget):
                logger.warning("%s: left out: %s", target.origin, target.reason)
                bad += 1
            elif split_of(target.id) != "train" or target.id in left_out:
                held_out += 1
            else:
                good += 1
                yield target.picture
    if not good:
        raise ValueError(
            f"--targets: expected pictures to train on, found none of the train split in "
            f"{', '.join(targets.spec for targets in sets)} ({bad} cannot be used, {held_out} are "
            "held out); give more"
        )


def kept_array(
    path: Path,
    make: Callable[[], ndarray],
    check: Callable[[], None],
    *,
    is_main_process: bool = True,
) -> ndarray:
    """Return the array of a .npy file, mapped into memory; made on first use.

    Args:
        path: on a file system that all processes share.
        check: called again and again while another process makes the file; may raise to stop.
        is_main_process: whether this process makes it.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be written.
    """
    # No barrier: the making may take longer than a launcher's processes wait for each other.
    while not path.exists() and not is_main_process:
        check()
        time.sleep(0.5)
    if not path.exists():
        array = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        # np.save adds a suffix to a bare name.
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, array)
    try:
        kept: ndarray = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}): delete it, it is made anew"
        ) from error
    return kept


def embed_sets(
    sets: Sequence[TargetSet],
    scene: Scene,
    recipe: Recipe,
    left_out: Set[str],
    check: Callable[[], None],
) -> Float32[ndarray, "targets embed"]:
    """Return unit embeddings of all training pictures, in order.
    ValueError: there is no such picture, or none whose embedding is finite."""
    parts = []
    stream = training_pictures(sets, left_out, "embed targets")
    while pictures := list(islice(stream, EMBED_BATCH)):
        check()
        part = embed_unit(scene, pictures, recipe).float().cpu().numpy()
        parts.append(part[np.isfinite(part).all(axis=1) & (part != 0).any(axis=1)])
    embeddings = np.concatenate(parts)
    if not len(embeddings):
        raise ValueError("--targets: no picture has a finite embedding: get the embedder again")
    return embeddings


def target_bank(
    folder: Path,
    specs: Sequence[str],
    scene: Scene,
    recipe: Recipe,
    left_out: Set[str],
    check: Callable[[], None] = lambda: None,
    *,
    is_main_process: bool = True,
) -> tuple[str, Float32[ndarray, "targets embed"]]:
    """Return unit embeddings of training targets, made once and kept in `folder`; and the name of
    their file, which differs for other targets and other networks.

    Only targets of the train split are in it, by their ids, as in a dataset of pairs: a picture
    that is there to validate or to test is never trained on, whatever the specs name.

    Args:
        left_out: ids of further targets to leave out.
        folder, check, is_main_process: see `kept_array`.

    Raises:
        ValueError, FileNotFoundError, OSError: specs that cannot be, or without any good picture.
    """
    sets = [open_targets(spec, scene.generator, scene.truncation) for spec in specs]
    digest = digest_of(
        "targets",
        [targets.identity() for targets in sets],
        scene.embedder.fingerprint,
        # The generator's size and the recipe's preprocessing then decide what is embedded.
        [scene.generator.resolution, recipe.preprocess]
        if recipe.target_preprocess == "same"
        else [],
        sorted(left_out),
    )
    path = folder / f"targets-{digest[:16]}.npy"
    bank = kept_array(
        path,
        lambda: embed_sets(sets, scene, recipe, left_out, check),
        check,
        is_main_process=is_main_process,
    )
    if bank.ndim != 2 or bank.shape[1] != scene.embedder.embed_dim or not len(bank):
        raise ValueError(
            f"{str(path)!r}: expected embeddings of {scene.embedder.embed_dim} numbers, found "
            f"shape {list(bank.shape)}: delete it, it is made anew"
        )
    return path.name, bank


def drawn_targets(
    bank: Float32[ndarray, "targets embed"], count: int, seed: int
) -> Float32[ndarray, "{count} embed"]:
    """Return so many random targets of a bank, in its order. Of one seed, fewer are among more.
    ValueError: the bank has not so many, or a single one is asked for, which has no variance."""
    if not 2 <= count <= len(bank):
        raise ValueError(
            f"--max-targets: expected 2 to {len(bank)}, the training targets, found {count}"
        )
    random = torch.Generator().manual_seed(seed_of("max targets", seed))
    chosen = np.sort(torch.randperm(len(bank), generator=random)[:count].numpy())
    drawn: ndarray = bank[chosen]
    return drawn


# Pairs


@dataclass(frozen=True)
class Pairs:
    """Training pairs of a dataset, in the order of their ids."""

    rows: datasets.Dataset = field(repr=False)
    digest: str
    """Hash of the dataset they are from."""
    embeddings: Float[Tensor, "pairs embed"]
    """Of length 1."""
    recipe: Recipe | None
    """That found the directions; None: it is not known."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def directions(self, chosen: Int[Tensor, " batch"]) -> Float[Tensor, "batch num_ws w_dim"]:
        """Read the directions of some pairs; they stay on disk until then."""
        directions: Tensor = self.rows[chosen.tolist()]["direction"]
        return directions


def open_pairs(folder: Path, count: int | None, scene: Scene, left_out: Set[str]) -> Pairs:
    """Return the first `count` pairs of the train split by order of ids, all if None.

    No other split is opened.

    FileNotFoundError, ValueError: see `load_pairs`; pairs of other networks, or too few.
    """
    rows = load_pairs(folder, "train")
    check_made_for(folder, rows.features, scene)
    ids = rows["id"][:]
    order = sorted((i for i in range(len(ids)) if ids[i] not in left_out), key=ids.__getitem__)
    used = len(order) if count is None else count
    if not 1 <= used <= len(order):
        raise ValueError(
            f"--num-pairs: expected 1 to {len(order)}, the training pairs of {str(folder)!r}, "
            f"found {used}"
        )
    rows = rows.select(order[:used])
    embeddings = F.normalize(rows["embedding"][:], dim=1)
    return Pairs(
        rows=rows.select_columns(["direction"]),
        digest=sha256_of(folder / SUMS),
        embeddings=embeddings,
        recipe=recipe_of(folder),
    )


# Units


def embedded_sources(scene: Scene, recipe: Recipe) -> Float[Tensor, "bank embed"]:
    """Return unit embeddings of the source bank."""
    with torch.no_grad():
        embeddings = scene.features(scene.bank(), recipe.preprocess)
    return F.normalize(embeddings.float(), dim=1)


def whitening_of(embeddings: Float[Tensor, "targets embed"]) -> Float[Tensor, "embed embed"]:
    """Return the symmetric matrix that brings unit embeddings to unit variance in every direction.

    What CLIP tells apart least still decides attributes, and gradients would come to it last.
    """
    values, vectors = torch.linalg.eigh(embeddings.double().T.cov())
    values = values.clamp_min(0) + EIGEN_FLOOR * values.mean()
    matrix: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return matrix.float()


def floored(deviation: Float[Tensor, "num_ws w_dim"]) -> Float[Tensor, "num_ws w_dim"]:
    """Raise small deviations to a part of the mean."""
    return deviation.clamp_min(FLOOR * float(deviation.mean()))


def scale_of_latents(scene: Scene) -> Float[Tensor, "num_ws w_dim"]:
    """Return the deviation of sources' w: the units of a direction where there are no pairs."""
    return floored(scene.latents([seed_of("spread", i) for i in range(LATENTS)]).std(dim=0))


def scale_of_pairs(pairs: Pairs) -> Float[Tensor, "num_ws w_dim"]:
    """Return the deviation of the pairs' directions from zero, for each layer and coordinate.

    From zero and not from their mean: a fresh mapper answers zero, so it has the mean to learn as
    well, and a single pair has a deviation too.

    ValueError: every direction is zero: there is nothing to learn, and no unit to learn it in.
    """
    total = torch.zeros(())
    for start in range(0, len(pairs), EMBED_BATCH):
        chosen = torch.arange(start, min(start + EMBED_BATCH, len(pairs)))
        total = total + pairs.directions(chosen).double().square().sum(dim=0)
    if not total.any():
        raise ValueError("--pairs: expected directions, found nothing but zeros: build them anew")
    return floored((total / len(pairs)).sqrt().float())


# Validation


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Targets and sources that nothing is trained on."""

    scene: Scene
    ids: frozenset[str]
    pictures: list[Image.Image]
    embeddings: Float[Tensor, "targets embed"]
    """Unit, preprocessed as the recipe wants them: the mapper's input."""
    judged: Float[Tensor, "targets embed"]
    """Raw, preprocessed as the embedder's library does: edits are compared with these."""
    in_range: Bool[Tensor, " targets"]
    """Whether the generator can show such a picture."""
    sources: Float[Tensor, "sources num_ws w_dim"]
    inverted: Float[Tensor, "sources num_ws w_dim"] | None
    """The same people as the inverter sees them; None where there is no inverter."""

    @staticmethod
    def open(specs: Sequence[str], scene: Scene, recipe: Recipe) -> "Validation":
        """Read and embed targets; pictures that cannot be read are left out.
        ValueError, FileNotFoundError, OSError: see `open_targets`; no good picture."""
        targets, in_range = [], []
        for spec in specs:
            for target in open_targets(spec, scene.generator, scene.truncation):
                if isinstance(target, Target):
                    targets.append(target)
                    in_range.append(spec.startswith(IN_RANGE))
        if not targets:
            raise ValueError(f"--validation: expected pictures, found none in {list(specs)}")
        pictures = [target.picture for target in targets]
        sources = scene.sources(SOURCES, VALIDATION_SOURCES)
        return Validation(
            scene=scene,
            ids=frozenset(target.id for target in targets),
            pictures=pictures,
            embeddings=embed_unit(scene, pictures, recipe),
            judged=scene.embedder.embed_pictures(pictures),
            in_range=torch.tensor(in_range),
            sources=sources,
            inverted=None if scene.inverter is None else inverted(scene, sources),
        )

    def figures(
        self,
        edits: Float[Tensor, "targets *sources num_ws w_dim"],
        expected: Float[Tensor, " targets"] | None = None,
        sources: Float[Tensor, "sources num_ws w_dim"] | None = None,
    ) -> dict[str, float]:
        """Return scores of edits in full precision, as means over targets.

        Args:
            edits: a direction for each target, or an offset for each of its sources.
            expected: transfer scores that were predicted; their mean error is returned as well.
            sources: None: the generated ones.
        """
        sources = self.sources if sources is None else sources
        scores = self.scene.score(self.judged, sources, edits, with_identity=True)
        transfer, in_range = scores.transfer, self.in_range.to(edits.device)
        figures = {
            "transfer_score": transfer,
            "transfer_score_in_range": transfer[in_range],
            "transfer_score_out_of_range": transfer[~in_range],
            "consistency_score": scores.consistency,
            "length": edits.flatten(-2).norm(dim=-1),
        }
        if scores.identity is not None:
            figures["identity_score"] = scores.identity
        if expected is not None:
            figures["expected_error"] = (expected - transfer).abs()
        return {name: float(values.mean()) for name, values in figures.items() if len(values)}

    def figures_of(self, mapper: Mapper) -> dict[str, float]:
        """Return `figures` of a mapper's edits of generated sources.

        Those of a mapper with a correction are of corrected edits. Further figures are then those
        of its directions alone, named `one_direction_...`, and of both on inverted sources,
        `inverted_...` and `inverted_one_direction_...`. Those of a mapper that reads the trade-off
        are of its middle, and `keep_0_...` and `keep_1_...` of its ends.
        """
        prediction: Prediction = mapper(self.embeddings)
        edits = mapper.edits(self.embeddings, self.sources)
        figures = self.figures(edits, prediction.expected)
        for end in () if mapper.config.tradeoff is None else (0, 1):
            edits = mapper.edits(self.embeddings, self.sources, keep=float(end))
            expected = mapper(self.embeddings, float(end)).expected
            more = self.figures(edits, expected)
            figures |= {f"keep_{end}_{name}": value for name, value in more.items()}
        if mapper.correction is None:
            return figures
        ways = {"one_direction": (prediction.directions, self.sources)}
        if self.inverted is not None:
            ways["inverted"] = (mapper.edits(self.embeddings, self.inverted), self.inverted)
            ways["inverted_one_direction"] = (prediction.directions, self.inverted)
        for way, (edits, sources) in ways.items():
            more = self.figures(edits, sources=sources)
            figures |= {f"{way}_{name}": value for name, value in more.items()}
        return figures

    def grid(self, edits: Float[Tensor, "targets *sources num_ws w_dim"]) -> Image.Image:
        """Draw the sources, then for each target a row: itself, and its edits of the sources.

        Args:
            edits: a direction for each target, or an offset for each of its sources.
        """
        kinds = [self.in_range.nonzero(), (~self.in_range).nonzero()]
        rows = {
            f"target {i} and sources with its essence": (
                self.pictures[i],
                edits[i] if edits.ndim == 3 else edits[i, :SHOWN],
            )
            for i in [int(i) for kind in kinds for i in kind[:SHOWN]]
        }
        return edits_sheet(self.scene, self.sources[:SHOWN], rows)
