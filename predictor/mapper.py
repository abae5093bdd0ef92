"""The mapper: from a target's embedding to its direction, in one pass, and to its corrections.

Knows the network and its file; nothing of training, or what is done where an answer is not good
enough. `predictor.folded` is a faster form of it for single targets.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.correction import Correction
from predictor.mapper_file import (
    FIRST_FORMAT,
    FORMATS,
    PLACES_FORMAT,
    TRAIN_ONE,
    MapperConfig,
    MapperRecord,
    OnTheHub,
    check_made_for,
    metadata_of,
    parse_metadata,
)
from predictor.tradeoff import (
    DEGREES,
    KEEP_RANK,
    MIDDLE,
    NO_TRADEOFF,
    UNITS,
    Keep,
    check_keep,
    keep_features,
    keep_layer,
)
from targetclip.command import write_file
from targetclip.weights import digest_of_weights, load_weights, read_tensors, tensor_bytes

START = 0.01  # deviation of fresh directions, as a part of scale


@dataclass(frozen=True)
class Prediction:
    """A mapper's answers to a batch of targets."""

    directions: Float[Tensor, "batch num_ws w_dim"]
    expected: Float[Tensor, " batch"]
    """Transfer score that each direction is expected to reach, in [-1, 1]."""


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(x)); a fresh one changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        changed: Tensor = x + self.outer(F.silu(self.inner(self.norm(x))))
        return changed


class Mapper(OnTheHub, nn.Module):
    """Embeddings [batch, embed_dim] to directions [batch, num_ws, w_dim] and expected scores.

    Where there is a correction, expected scores are those of corrected edits. Where the config has
    a trade-off, every answer is that of a place `keep` on it, from 0, most essence, to 1, most
    identity kept; by default that of `keep`. `record` says where the weights come from; None until
    set or loaded. Buffers:

    - `centre` [embed_dim]: the mean unit embedding of sources, which carries no essence; zeros
      until set.
    - `whitening` [embed_dim, embed_dim]: brings targets to unit variance in every direction; until
      set it brings unit vectors to coordinates of about 1.
    - `scale` [num_ws, w_dim]: the deviation of directions; ones until set.
    - `keep_units` [degrees]: factors of what is read of the trade-off, where it is read.
    """

    centre: Tensor
    whitening: Tensor
    scale: Tensor
    keep_units: Tensor

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        self.record: MapperRecord | None = None
        self.register_buffer("centre", torch.zeros(config.embed_dim))
        self.register_buffer("whitening", math.sqrt(config.embed_dim) * torch.eye(config.embed_dim))
        self.register_buffer("scale", torch.ones(config.num_ws, config.w_dim))
        size = config.num_ws * config.w_dim
        heads = size if config.rank is None else config.rank
        # Most of the way from an embedding to its direction is linear; blocks learn the rest.
        self.linear = nn.Linear(config.embed_dim, heads, bias=False)
        self.enter = nn.Linear(config.embed_dim, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.direction = nn.Linear(config.width, heads)
        # Targets differ in far fewer ways than a direction has numbers, and the last matrix takes
        # most of the time of a single answer.
        self.basis = None if config.rank is None else nn.Linear(heads, size, bias=False)
        self.score = nn.Linear(config.width, 1)
        nn.init.normal_(self.direction.weight, std=START / math.sqrt(config.width))
        if self.basis is not None:
            nn.init.normal_(self.basis.weight, std=1 / math.sqrt(heads))
        nn.init.zeros_(self.direction.bias)
        nn.init.zeros_(self.linear.weight)
        # Features keep what directions need. How hard a target is shows in the embedding as well.
        self.score_linear = nn.Linear(config.embed_dim, 1, bias=False)
        nn.init.zeros_(self.score_linear.weight)
        reads_keep = config.tradeoff is not None
        # Last, so that the others start as they do without it.
        self.correction = None
        if config.correction is not None:
            sizes = (config.embed_dim, config.num_ws, config.w_dim)
            self.correction = Correction(config.correction, *sizes, tradeoff=reads_keep)
        # A place shifts what blocks read, stretches each head, and adds to the heads what it makes
        # of the same inputs, by matrices of a low rank, so that it can say what to give up even
        # where all other weights are held.
        self.keep_enter = keep_layer(config.width) if reads_keep else None
        self.keep_gain = keep_layer(heads) if reads_keep else None
        self.keep_score = keep_layer(1) if reads_keep else None
        self.keep_read = self.keep_heads = None
        if reads_keep:
            self.register_buffer("keep_units", torch.tensor(UNITS))
            self.keep_read = keep_layer(KEEP_RANK, config.width + config.embed_dim)
            self.keep_heads = nn.Linear(KEEP_RANK, heads, bias=False)
            nn.init.normal_(self.keep_heads.weight, std=1 / math.sqrt(KEEP_RANK))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights, and of `keep` where there is one. Computed once: do not change
        weights after reading it."""
        place = "" if self.keep is None else f"keep {self.keep}"
        return digest_of_weights(place, self.state_dict())

    @property
    def keep(self) -> float | None:
        """The place on the trade-off that is answered where none is asked for; None: the mapper
        reads none."""
        if self.config.tradeoff is None:
            return None
        figures = {} if self.record is None else self.record.calibration
        origin = self.config.tradeoff.origin
        return float(figures.get("keep_identity", MIDDLE if origin is None else origin))

    def places(self, keep: Keep | None, count: int) -> Float[Tensor, "{count} degrees"] | None:
        """Return what the network reads of the trade-off, a row for each of so many targets; None
        where it reads nothing.
        ValueError: a place that is not from 0 to 1, or one where the mapper reads none."""
        if self.config.tradeoff is None:
            if keep is not None:
                raise ValueError(NO_TRADEOFF)
            return None
        asked = self.keep if keep is None else keep
        rows = torch.as_tensor(asked, dtype=torch.float32, device=self.scale.device)
        check_keep(float(rows.min()))
        check_keep(float(rows.max()))
        return keep_features(rows.expand(count), self.config.tradeoff.origin) * self.keep_units

    def check_size(self, embeddings: Float[Tensor, "batch embed"]) -> None:
        """Raise a ValueError for embeddings of another size."""
        size = self.config.embed_dim
        if embeddings.shape[1] != size:
            raise ValueError(
                f"expected embeddings of shape [batch, {size}], found {list(embeddings.shape)}: "
                f"this mapper reads those of embedder {self.config.embedder[:12]}"
            )

    def whitened_targets(
        self, embeddings: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch embed"]:
        """Return targets' embeddings, raw or unit, as the network reads them.
        ValueError: embeddings of another size."""
        self.check_size(embeddings)
        white: Tensor = (F.normalize(embeddings.float(), dim=1) - self.centre) @ self.whitening
        return white

    def features(
        self,
        white: Float[Tensor, "batch embed"],
        places: Float[Tensor, "batch degrees"] | None = None,
    ) -> Float[Tensor, "batch width"]:
        """Return the input of both heads, from whitened targets and `places`."""
        x = self.enter(white)
        if self.keep_enter is not None:
            x = x + self.keep_enter(places)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def directions_of(
        self,
        white: Float[Tensor, "batch embed"],
        features: Float[Tensor, "batch width"],
        places: Float[Tensor, "batch degrees"] | None = None,
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Return the directions of whitened differences, their features and `places`."""
        out = self.direction(features) + self.linear(white)
        if places is not None:
            assert self.keep_gain and self.keep_read and self.keep_heads, "they come together"
            read = torch.cat((features, white), dim=1)[:, None] * places[:, :, None]
            read = read / self.keep_units[0]  # at most 1, as these matrices learn by themselves
            out = out * (1 + self.keep_gain(places)) + self.keep_heads(
                self.keep_read(read.flatten(1))
            )
        if self.basis is not None:
            out = self.basis(out)
        shape = (self.config.num_ws, self.config.w_dim)
        directions: Tensor = out.float().unflatten(1, shape) * self.scale
        return directions

    def directions_of_differences(
        self, differences: Float[Tensor, "batch embed"], keep: Keep | None = None
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Return the directions of differences between unit embeddings: target less source.
        ValueError: embeddings of another size; see `places`."""
        self.check_size(differences)
        white, places = differences.float() @ self.whitening, self.places(keep, len(differences))
        return self.directions_of(white, self.features(white, places), places)

    def forward(
        self, embeddings: Float[Tensor, "batch embed"], keep: Keep | None = None
    ) -> Prediction:
        """Return the directions of targets from their embeddings, raw or unit.
        ValueError: embeddings of another size; see `places`."""
        white, places = self.whitened_targets(embeddings), self.places(keep, len(embeddings))
        features = self.features(white, places)
        # Detached: the score must not be learned at the cost of the direction.
        score = self.score(features.detach()) + self.score_linear(white)
        if self.keep_score is not None:
            score = score + self.keep_score(places)
        expected = torch.tanh(score.float()).squeeze(1)
        return Prediction(self.directions_of(white, features, places), expected)

    def correct(
        self,
        embeddings: Float[Tensor, "targets embed"],
        ws: Float[Tensor, "*targets sources num_ws w_dim"],
        keep: Keep | None = None,
    ) -> Float[Tensor, "targets sources num_ws w_dim"]:
        """Return what is added to a target's direction for each source: zeros without a correction.
        ValueError: embeddings of another size; see `places`.

        Args:
            embeddings: of the targets, raw or unit.
            ws: latents of the sources, the same for all targets or some for each. For a clip, its
                mean latent: all frames share one correction.
        """
        white, places = self.whitened_targets(embeddings), self.places(keep, len(embeddings))
        if self.correction is None:
            return torch.zeros_like(ws).expand(len(embeddings), *ws.shape[-3:])
        scaled: Tensor = self.correction(white, ws, places).float() * self.scale
        return scaled

    def edits(
        self,
        embeddings: Float[Tensor, "targets embed"],
        ws: Float[Tensor, "*targets sources num_ws w_dim"],
        keep: Keep | None = None,
    ) -> Float[Tensor, "targets *sources num_ws w_dim"]:
        """Return targets' directions or, with a correction, the offset of each source: see
        `correct`."""
        directions: Tensor = self(embeddings, keep).directions
        if self.correction is None:
            return directions
        return directions[:, None] + self.correct(embeddings, ws, keep)

    @classmethod
    def from_file(cls, path: Path, generator: str | None, embedder: str | None) -> "Mapper":
        return load_mapper(path, generator, embedder)[0]

    def to_file(self, path: Path, record: MapperRecord) -> None:
        save_mapper(self, path, record)


def save_mapper(
    mapper: Mapper, path: str | Path, record: MapperRecord, *, half: bool = False
) -> None:
    """Write a mapper as one safetensors file, whole or not at all; make its folder if missing.

    With `half` the weights, not the buffers, are rounded to half precision. ValueError: weights
    that are not finite (after rounding), or a record that JSON cannot hold; nothing is written.
    """
    path, tensors = Path(path), dict[str, Tensor]()
    buffers = dict(mapper.named_buffers())
    for name, value in mapper.state_dict().items():
        tensors[name] = value.to(torch.float16 if half and name not in buffers else torch.float32)
        if not tensors[name].isfinite().all():
            raise ValueError(
                f"{path}: expected finite weights, found NaN or infinity in {name}: not written"
            )
    content = tensor_bytes(tensors, metadata_of(mapper.config, record))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content)


def load_mapper(
    path: str | Path, generator: str | None = None, embedder: str | None = None
) -> tuple[Mapper, MapperRecord]:
    """Read a mapper and its record, and check that it is for the generator and the embedder of
    these fingerprints. It is ready to answer: on the processor, in float32, its parameters frozen.
    FileNotFoundError: no such file. ValueError: not a mapper's file, a damaged one, or one of
    another generator or embedder."""
    path = Path(path)
    metadata, state = read_tensors(path, "mapper", FORMATS, TRAIN_ONE)
    config, record = parse_metadata(metadata, path)
    check_made_for(config, generator, embedder, str(path))
    if metadata["format"] == PLACES_FORMAT:  # nothing was added to heads
        width, size = config.width + config.embed_dim, config.rank or config.num_ws * config.w_dim
        state["keep_read.weight"] = torch.zeros(KEEP_RANK, width * DEGREES)
        numbers = torch.Generator().manual_seed(0)  # not zeros, so that training can go on
        state["keep_heads.weight"] = torch.randn(size, KEEP_RANK, generator=numbers) / 8
    if metadata["format"] == FIRST_FORMAT and "score_linear.weight" not in state:
        state["score_linear.weight"] = torch.zeros(1, config.embed_dim)  # scores read features
    # No memory and no random numbers are spent on weights that are replaced at once.
    with torch.device("meta"):
        mapper = Mapper(config)
    load_weights(mapper, state, path)
    mapper.record = record
    return mapper.eval().requires_grad_(False), record
