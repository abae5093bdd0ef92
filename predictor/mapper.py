"""The mapper: from a target's embedding to its direction, in one pass, and to its corrections.

Knows the network, a faster form of it for single targets, and its file; nothing of training, or
what is done where an answer is not good enough.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.correction import Correction, FoldedCorrection, SourceCorrection
from predictor.mapper_file import (
    FIRST_FORMAT,
    FORMAT,
    SECOND_FORMAT,
    TRAIN_ONE,
    MapperConfig,
    MapperRecord,
    OnTheHub,
    check_made_for,
    metadata_of,
    parse_metadata,
)
from targetclip.command import write_file
from targetclip.weights import digest_of_weights, load_weights, read_tensors, tensor_bytes

FORMATS = (FORMAT, SECOND_FORMAT, FIRST_FORMAT)
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

    Where there is a correction, expected scores are those of corrected edits. `record` says where
    the weights come from; None until set or loaded. Buffers:

    - `centre` [embed_dim]: the mean unit embedding of sources, which carries no essence; zeros
      until set.
    - `whitening` [embed_dim, embed_dim]: brings targets to unit variance in every direction; until
      set it brings unit vectors to coordinates of about 1.
    - `scale` [num_ws, w_dim]: the deviation of directions; ones until set.
    """

    centre: Tensor
    whitening: Tensor
    scale: Tensor

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
        # Last, so that the others start as they do without it.
        self.correction = None
        if config.correction is not None:
            sizes = (config.embed_dim, config.num_ws, config.w_dim)
            self.correction = Correction(config.correction, *sizes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights. Computed once: do not change weights after reading it."""
        return digest_of_weights("", self.state_dict())

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

    def features(self, white: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch width"]:
        """Return the input of both heads."""
        x = self.enter(white)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def directions_of(
        self, white: Float[Tensor, "batch embed"], features: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Return the directions of whitened differences and their features."""
        out = self.direction(features) + self.linear(white)
        if self.basis is not None:
            out = self.basis(out)
        shape = (self.config.num_ws, self.config.w_dim)
        directions: Tensor = out.float().unflatten(1, shape) * self.scale
        return directions

    def directions_of_differences(
        self, differences: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Return the directions of differences between unit embeddings: target less source.
        ValueError: embeddings of another size."""
        self.check_size(differences)
        white = differences.float() @ self.whitening
        return self.directions_of(white, self.features(white))

    def forward(self, embeddings: Float[Tensor, "batch embed"]) -> Prediction:
        """Return the directions of targets from their embeddings, raw or unit.
        ValueError: embeddings of another size."""
        white = self.whitened_targets(embeddings)
        features = self.features(white)
        # Detached: the score must not be learned at the cost of the direction.
        score = self.score(features.detach()) + self.score_linear(white)
        expected = torch.tanh(score.float()).squeeze(1)
        return Prediction(self.directions_of(white, features), expected)

    def correct(
        self,
        embeddings: Float[Tensor, "targets embed"],
        ws: Float[Tensor, "*targets sources num_ws w_dim"],
    ) -> Float[Tensor, "targets sources num_ws w_dim"]:
        """Return what is added to a target's direction for each source: zeros without a correction.
        ValueError: embeddings of another size.

        Args:
            embeddings: of the targets, raw or unit.
            ws: latents of the sources, the same for all targets or some for each. For a clip, its
                mean latent: all frames share one correction.
        """
        white = self.whitened_targets(embeddings)
        if self.correction is None:
            return torch.zeros_like(ws).expand(len(embeddings), *ws.shape[-3:])
        scaled: Tensor = self.correction(white, ws).float() * self.scale
        return scaled

    def edits(
        self,
        embeddings: Float[Tensor, "targets embed"],
        ws: Float[Tensor, "*targets sources num_ws w_dim"],
    ) -> Float[Tensor, "targets *sources num_ws w_dim"]:
        """Return targets' directions or, with a correction, the offset of each source: see
        `correct`."""
        directions: Tensor = self(embeddings).directions
        if self.correction is None:
            return directions
        return directions[:, None] + self.correct(embeddings, ws)

    @classmethod
    def from_file(cls, path: Path, generator: str | None, embedder: str | None) -> "Mapper":
        return load_mapper(path, generator, embedder)[0]

    def to_file(self, path: Path, record: MapperRecord) -> None:
        save_mapper(self, path, record)


class FoldedMapper:
    """A copy of a mapper that answers one target at a time, in as few operations as it takes.

    A single answer spends its time on starting operations, not on arithmetic. So linear layers in a
    row become one matrix: the whitening with the layers that read it, the heads side by side, and
    the scale with the matrix before it. Later changes of the mapper do not reach the copy.
    """

    def __init__(self, mapper: Mapper) -> None:
        def tensors_of(module: nn.Module) -> list[Tensor]:
            return [parameter.detach().clone() for parameter in module.parameters()]

        config = mapper.config
        self.check_size = mapper.check_size
        self.width, self.shape = config.width, (config.num_ws, config.w_dim)
        with torch.no_grad():
            reads = (mapper.enter.weight, mapper.linear.weight, mapper.score_linear.weight)
            first = torch.cat(reads) @ mapper.whitening.T
            added = (mapper.enter.bias, mapper.direction.bias, mapper.score.bias)
            offset = torch.cat(added) - first @ mapper.centre
            last = torch.cat((mapper.direction.weight, mapper.score.weight))
            scale = mapper.scale.flatten()
            if mapper.basis is None:
                first[self.width : -1] *= scale[:, None]
                offset[self.width : -1] *= scale
                last[:-1] *= scale[:, None]
                self.basis = None
            else:
                # A row of zeros leaves out the score, the last of the heads.
                self.basis = F.pad((mapper.basis.weight * scale[:, None]).T, (0, 0, 0, 1))
            self.first, self.offset, self.last = first.T, offset, last.T.contiguous()
        # Plain tensors: a module finds its parameters by name at every call, which takes time here.
        self.blocks = [tensors_of(block) for block in mapper.blocks]
        self.norm, self.norm_bias = tensors_of(mapper.norm)
        self.corrections = None
        if mapper.correction is not None:
            units = (mapper.centre, mapper.whitening, mapper.scale)
            self.corrections = FoldedCorrection(mapper.correction, *units)

    def __call__(
        self, embedding: Float[Tensor, "1 embed"]
    ) -> tuple[Float[Tensor, "num_ws w_dim"], float]:
        """Return the direction of a target and its expected transfer score, from its embedding, raw
        or unit. They equal the mapper's but for rounding.
        ValueError: an embedding of another size, or one that is not finite."""
        embedding, factor = self.checked(embedding)
        entered = torch.addmm(self.offset, embedding, self.first, alpha=factor)
        x, size = entered[:, : self.width], (self.width,)
        for norm, norm_bias, inner, inner_bias, outer, outer_bias in self.blocks:
            hidden = F.silu(F.linear(F.layer_norm(x, size, norm, norm_bias), inner, inner_bias))
            x = x + F.linear(hidden, outer, outer_bias)
        features = F.layer_norm(x, size, self.norm, self.norm_bias)
        heads = torch.addmm(entered[:, self.width :], features, self.last)
        direction = heads[:, :-1] if self.basis is None else heads @ self.basis
        return direction.float().view(self.shape), math.tanh(float(heads[0, -1]))

    def checked(
        self, embedding: Float[Tensor, "1 embed"]
    ) -> tuple[Float[Tensor, "1 embed"], float]:
        """Return an embedding in float32, and the factor that makes it unit."""
        self.check_size(embedding)
        embedding = embedding.detach().float()
        length = math.sqrt(float(embedding @ embedding.T))
        if not math.isfinite(length):
            raise ValueError(f"expected an embedding of finite length, found one of {length}")
        return embedding, 1 / max(length, 1e-12)

    def correction(self, embedding: Float[Tensor, "1 embed"]) -> SourceCorrection | None:
        """Return the correction for a target, from its embedding, raw or unit; None where the
        mapper has none. It equals the mapper's but for rounding.
        ValueError: see `__call__`."""
        embedding, factor = self.checked(embedding)
        return None if self.corrections is None else self.corrections(factor * embedding)


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
    """Read a mapper, and check that it belongs to the generator and the embedder with fingerprints.

    Returns:
        The mapper, for inference, on the processor, in float32, its parameters frozen; its record.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapper's file, a damaged one, or one of another generator or embedder.
    """
    path = Path(path)
    metadata, state = read_tensors(path, "mapper", FORMATS, TRAIN_ONE)
    config, record = parse_metadata(metadata, path)
    check_made_for(config, generator, embedder, str(path))
    if metadata["format"] == FIRST_FORMAT and "score_linear.weight" not in state:
        state["score_linear.weight"] = torch.zeros(1, config.embed_dim)  # scores read features
    # No memory and no random numbers are spent on weights that are replaced at once.
    with torch.device("meta"):
        mapper = Mapper(config)
    load_weights(mapper, state, path)
    mapper.record = record
    return mapper.eval().requires_grad_(False), record
