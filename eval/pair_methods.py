"""Baselines that know the teacher's pairs alone: their mean, the nearest, a ridge regression.

Knows embeddings and directions; nothing of pictures, generators or scores.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from data.card import CARD, SUMS
from data.dataset import load_pairs
from data.pairs import dimensions
from data.publish import sha256_of
from targetclip.embedder import ImageEmbedder
from targetclip.generators import Generator

ROWS = 256  # directions in memory at once, while they are summed up
PENALTIES = tuple(10.0**power for power in range(-7, 2))


@dataclass(frozen=True)
class Ridge:
    """A linear map from unit embeddings to directions."""

    centre: Float64[Tensor, " embed"]
    mean: Float64[Tensor, " entries"]
    """Direction of an embedding at the centre, layers one after the other."""
    weights: Float64[Tensor, "embed entries"]
    penalty: float
    """Added to the variances of the embedding's coordinates; chosen on validation pairs."""


@dataclass(frozen=True)
class PairTable:
    """What the baselines keep of the pairs."""

    rows: datasets.Dataset = field(repr=False)
    """Of the train split; its directions stay on disk."""
    embeddings: Float[Tensor, "pairs embed"]
    """Of length 1."""
    shape: tuple[int, int]
    """Of a direction: num_ws, w_dim."""
    ridge: Ridge
    ids: frozenset[str]
    digest: str
    """Hash of the dataset."""

    def mean_directions(
        self, embeddings: Float[Tensor, "targets embed"]
    ) -> Float[Tensor, "targets num_ws w_dim"]:
        """The mean of all training directions, whatever the target."""
        mean = self.ridge.mean.float().reshape(self.shape)
        return mean.repeat(len(embeddings), 1, 1)

    def nearest_directions(
        self, embeddings: Float[Tensor, "targets embed"]
    ) -> Float[Tensor, "targets num_ws w_dim"]:
        """The direction of the training pair whose embedding has the highest cosine."""
        nearest = (F.normalize(embeddings, dim=1) @ self.embeddings.T).argmax(dim=1)
        # One at a time: a table of rows knows no order and no repetition but its own.
        return torch.stack([self.rows[int(i)]["direction"] for i in nearest])

    def ridge_directions(
        self, embeddings: Float[Tensor, "targets embed"]
    ) -> Float[Tensor, "targets num_ws w_dim"]:
        """The ridge regression's."""
        ridge = self.ridge
        offsets = F.normalize(embeddings.double(), dim=1) - ridge.centre
        found = (ridge.mean + offsets @ ridge.weights).float()
        return found.reshape(len(found), *self.shape)


@dataclass(frozen=True)
class Sums:
    """What a regression needs to know of pairs, in float64."""

    centre: Float64[Tensor, " embed"]
    mean: Float64[Tensor, " entries"]
    covariance: Float64[Tensor, "embed embed"]
    cross: Float64[Tensor, "embed entries"]


def sum_up(rows: datasets.Dataset) -> Sums:
    """Means and covariances of unit embeddings and directions, a few rows in memory at a time."""
    embeddings = F.normalize(rows["embedding"][:].double(), dim=1)
    centre = embeddings.mean(dim=0)
    offsets = embeddings - centre
    total, cross = torch.zeros(()), torch.zeros(())
    for start in range(0, len(rows), ROWS):
        directions = rows[start : start + ROWS]["direction"].double().flatten(1)
        total = total + directions.sum(dim=0)
        cross = cross + offsets[start : start + ROWS].T @ directions
    count = len(rows)
    return Sums(centre, total / count, offsets.T @ offsets / count, cross / count)


def fit_ridge(train: datasets.Dataset, validation: datasets.Dataset) -> Ridge:
    """Fit on train pairs; the penalty is the one of least squared error on validation pairs."""
    sums = sum_up(train)
    variances, axes = torch.linalg.eigh(sums.covariance)
    projected = axes.T @ sums.cross
    offsets = F.normalize(validation["embedding"][:].double(), dim=1) - sums.centre
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    weights = [axes @ (projected / (variances[:, None] + penalty)) for penalty in PENALTIES]
    for start in range(0, len(validation), ROWS):
        wanted = validation[start : start + ROWS]["direction"].double().flatten(1)
        part = offsets[start : start + ROWS]
        for i, map_ in enumerate(weights):
            errors[i] += (sums.mean + part @ map_ - wanted).square().sum()
    best = int(errors.argmin())
    return Ridge(sums.centre, sums.mean, weights[best], PENALTIES[best])


def open_pair_table(folder: Path, generator: Generator, embedder: ImageEmbedder) -> PairTable:
    """Read a dataset of pairs and fit what is fitted on it: train and validation splits alone.

    Raises:
        FileNotFoundError, ValueError: see `load_pairs`; pairs of other networks.
    """
    train, validation = load_pairs(folder, "train"), load_pairs(folder, "validation")
    found = dimensions(train.features)
    card = (folder / CARD).read_text("utf-8", errors="replace")
    expected = (embedder.embed_dim, generator.num_ws, generator.w_dim)
    prints = (generator.fingerprint, embedder.fingerprint)
    if found != expected or not all(fingerprint in card for fingerprint in prints):
        raise ValueError(
            f"--pairs: expected pairs of generator {prints[0][:12]} and embedder {prints[1][:12]}, "
            f"{expected}, found others, {found}, in {str(folder)!r}; build pairs for this world"
        )
    return PairTable(
        train,
        F.normalize(train["embedding"][:], dim=1),
        (generator.num_ws, generator.w_dim),
        fit_ridge(train, validation),
        frozenset(train["id"][:]),
        sha256_of(folder / SUMS),
    )
