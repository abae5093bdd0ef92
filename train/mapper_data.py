"""What the mapper learns from: embeddings of targets, pairs of the teacher, and their units.

Knows pictures, pairs and latents and what may be trained on; nothing of losses or of the training.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.card import CARD, SUMS
from data.dataset import load_pairs
from data.pairs import dimensions
from data.publish import sha256_of
from data.targets import BadTarget, TargetSet, digest_of, open_targets, split_of
from targetclip.embedder import ImageEmbedder
from targetclip.encoders.identity import IdentityModel, feature_model
from targetclip.generators import Generator
from targetclip.optimize import embed_latents
from targetclip.recipes import Recipe
from targetclip.sources import source_bank
from targetclip.scene import random_latents
from targetclip.seeds import seed_of
from targetclip.targets import embed_targets

logger = logging.getLogger(__name__)

EMBED_BATCH = 256
LATENTS = 4096  # drawn to measure how far they spread
EIGEN_FLOOR = 0.01  # of the mean variance: what hardly varies is noise
FLOOR = 0.05  # of the mean deviation: what hardly varies must not become the loudest coordinate


@dataclass(frozen=True)
class Scene:
    """The frozen networks, and how pictures and sources meet them."""

    generator: Generator
    embedder: ImageEmbedder
    recipe: Recipe
    truncation: float
    max_images: int
    """Images rendered at once."""
    identity: IdentityModel | None = None

    @property
    def device(self) -> torch.device:
        return self.generator.mean_w.device

    def embed_latents(
        self, ws: Float[Tensor, "images num_ws w_dim"]
    ) -> Float[Tensor, "images embed"]:
        """Raw embeddings of renderings; differentiable."""
        preprocess = self.recipe.preprocess
        return embed_latents(self.generator, self.embedder, ws, preprocess, self.max_images)

    def see_latents(self, ws: Float[Tensor, "images num_ws w_dim"]) -> Float[Tensor, "images seen"]:
        """What the recipe's `feature_model` see of renderings; differentiable."""
        seeing = feature_model(self.embedder, self.identity, self.recipe.identity_weight)
        return embed_latents(self.generator, seeing, ws, self.recipe.preprocess, self.max_images)

    def embed_targets(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "targets embed"]:
        """Unit embeddings of target pictures, as the recipe wants them preprocessed."""
        raw = embed_targets(self.generator, self.embedder, pictures, self.recipe)
        return F.normalize(raw, dim=1)


# Targets


@dataclass
class Skipped:
    """Candidates that are not trained on, and why."""

    held_out: int = 0
    bad: int = 0


def training_pictures(
    sets: Sequence[TargetSet], left_out: Set[str], skipped: Skipped
) -> Iterator[Image.Image]:
    """Pictures of targets whose id is of the train split and not in `left_out`."""
    for targets in sets:
        for target in targets:
            if isinstance(target, BadTarget):
                logger.warning("%s: left out: %s", target.origin, target.reason)
                skipped.bad += 1
            elif split_of(target.id) != "train" or target.id in left_out:
                skipped.held_out += 1
            else:
                yield target.picture


def embed_sets(
    sets: Sequence[TargetSet], scene: Scene, left_out: Set[str], check: Callable[[], None]
) -> Float32[ndarray, "targets embed"]:
    """Unit embeddings of all training pictures, in order."""
    skipped, parts = Skipped(), []
    stream = training_pictures(sets, left_out, skipped)
    with tqdm(desc="embed targets", total=sum(map(len, sets)), unit="target") as bar:
        while pictures := list(islice(stream, EMBED_BATCH)):
            check()
            found = scene.embed_targets(pictures).float().cpu().numpy()
            parts.append(found[np.isfinite(found).all(axis=1) & (found != 0).any(axis=1)])
            bar.update(sum(map(len, parts)) + skipped.bad + skipped.held_out - bar.n)
    embeddings = np.concatenate([np.zeros((0, scene.embedder.embed_dim), np.float32), *parts])
    if not len(embeddings):
        raise ValueError(
            f"--targets: expected pictures to train on, found none of the train split in "
            f"{', '.join(targets.spec for targets in sets)} ({skipped.bad} cannot be used, "
            f"{skipped.held_out} are held out); give more"
        )
    return embeddings


def bank_name(sets: Sequence[TargetSet], scene: Scene, left_out: Set[str]) -> str:
    """Name of the file of embeddings: other targets or other networks give another."""
    recipe = scene.recipe
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
    return f"targets-{digest[:16]}.npy"


def target_bank(
    folder: Path,
    specs: Sequence[str],
    scene: Scene,
    left_out: Set[str],
    write: Callable[[Path, Float32[ndarray, "targets embed"]], None] | None,
    check: Callable[[], None],
) -> tuple[str, Float32[ndarray, "targets embed"]]:
    """Unit embeddings of training targets, made once and kept in `folder`; and the file's name.

    Only targets of the train split are in it, by their ids, as in a dataset of pairs: a picture
    that is there to validate or to test is never trained on, whatever the specs name.

    Args:
        folder: on a file system that all processes share.
        left_out: ids of further targets to leave out.
        write: makes the file; None in a process that waits until another has made it.
        check: called again and again; may raise to stop.

    Raises:
        ValueError, FileNotFoundError, OSError: specs that cannot be, or without any good picture.
    """
    sets = [open_targets(spec, scene.generator, scene.truncation) for spec in specs]
    path = folder / bank_name(sets, scene, left_out)
    # No barrier: the making may take longer than a launcher's processes wait for each other.
    while not path.exists() and write is None:
        check()
        time.sleep(0.5)
    if not path.exists() and write is not None:
        write(path, embed_sets(sets, scene, left_out, check))
    try:
        bank: Float32[ndarray, "targets embed"] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}): delete it, it is made anew"
        ) from error
    if bank.ndim != 2 or bank.shape[1] != scene.embedder.embed_dim or not len(bank):
        raise ValueError(
            f"{str(path)!r}: expected embeddings of {scene.embedder.embed_dim} numbers, found "
            f"shape {list(bank.shape)}: delete it, it is made anew"
        )
    return path.name, bank


# Pairs


@dataclass(frozen=True)
class Pairs:
    """Training pairs of the teacher, in the order of their ids."""

    rows: datasets.Dataset = field(repr=False)
    digest: str
    """Hash of the dataset they are from."""
    embeddings: Float[Tensor, "pairs embed"]
    """Of length 1."""

    def __len__(self) -> int:
        return len(self.embeddings)

    def directions(self, chosen: Int[Tensor, " batch"]) -> Float[Tensor, "batch num_ws w_dim"]:
        """The teacher's directions of some pairs; they stay on disk until asked for."""
        found: Tensor = self.rows[chosen.tolist()]["direction"]
        return found


def check_pairs(folder: Path, found: tuple[int, int, int], scene: Scene) -> None:
    """Raise a ValueError unless the pairs are for this generator and this embedder."""
    generator, embedder = scene.generator, scene.embedder
    expected = (embedder.embed_dim, generator.num_ws, generator.w_dim)
    if found != expected:
        raise ValueError(
            f"--pairs: expected embed, num_ws, w_dim {expected}, as this world's, found {found} in "
            f"{str(folder)!r}; build pairs for this world, or give theirs as --world"
        )
    card = (folder / CARD).read_text("utf-8", errors="replace")
    for name, fingerprint in (
        ("generator", generator.fingerprint),
        ("embedder", embedder.fingerprint),
    ):
        if fingerprint not in card:
            raise ValueError(
                f"--pairs: expected pairs of {name} {fingerprint[:12]}, found another one in the "
                f"card of {str(folder)!r}; build pairs for this world, or give theirs as --world"
            )


def open_pairs(folder: Path, count: int | None, scene: Scene, left_out: Set[str]) -> Pairs:
    """The first `count` pairs of the train split by order of ids, all if None.

    No other split is opened.

    Raises:
        FileNotFoundError, ValueError: see `load_pairs`; pairs of other networks, or too few.
    """
    rows = load_pairs(folder, "train")
    check_pairs(folder, dimensions(rows.features), scene)
    ids = rows["id"][:]
    order = sorted((i for i in range(len(ids)) if ids[i] not in left_out), key=ids.__getitem__)
    wanted = len(order) if count is None else count
    if not 1 <= wanted <= len(order):
        raise ValueError(
            f"--num-pairs: expected 1 to {len(order)}, the training pairs of {str(folder)!r}, "
            f"found {wanted}"
        )
    rows = rows.select(order[:wanted])
    embeddings = F.normalize(rows["embedding"][:], dim=1)
    return Pairs(rows.select_columns(["direction"]), sha256_of(folder / SUMS), embeddings)


# Units


def embedded_sources(scene: Scene) -> Float[Tensor, "bank embed"]:
    """Unit embeddings of the teacher's source bank."""
    with torch.no_grad():
        embeddings = scene.embed_latents(source_bank(scene.generator, scene.truncation))
    return F.normalize(embeddings.float(), dim=1)


def whitening_of(embeddings: Float[Tensor, "targets embed"]) -> Float[Tensor, "embed embed"]:
    """The symmetric matrix that brings unit embeddings to unit variance in every direction.

    What CLIP tells apart least still decides attributes, and gradients would come to it last.
    """
    values, vectors = torch.linalg.eigh(embeddings.double().T.cov())
    values = values.clamp_min(0) + EIGEN_FLOOR * values.mean()
    matrix: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return matrix.float()


def floored(deviation: Float[Tensor, "num_ws w_dim"]) -> Float[Tensor, "num_ws w_dim"]:
    return deviation.clamp_min(FLOOR * float(deviation.mean()))


def scale_of_latents(scene: Scene) -> Float[Tensor, "num_ws w_dim"]:
    """Deviation of a source's w: what an edit's coordinate may be measured by without a teacher."""
    seeds = [seed_of("spread", i) for i in range(LATENTS)]
    return floored(random_latents(scene.generator, seeds, scene.truncation).std(dim=0))


def scale_of_pairs(pairs: Pairs) -> Float[Tensor, "num_ws w_dim"]:
    """Deviation of the teacher's directions from zero, for each layer and coordinate.

    From zero and not from their mean: a fresh mapper answers zero, so it has the mean to learn as
    well, and a single pair has a deviation too.

    Raises:
        ValueError: every direction is zero: there is nothing to learn, and no unit to learn it in.
    """
    total = torch.zeros(())
    for start in range(0, len(pairs), EMBED_BATCH):
        chosen = torch.arange(start, min(start + EMBED_BATCH, len(pairs)))
        total = total + pairs.directions(chosen).double().square().sum(dim=0)
    if not total.any():
        raise ValueError("--pairs: expected directions, found nothing but zeros: build them anew")
    return floored((total / len(pairs)).sqrt().float())
