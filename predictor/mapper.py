"""The mapper: a target's embedding to its direction, in one pass.

Knows one network, its file and how the Hub keeps such files; nothing of how it is trained, of
sources, or of what is done where its answer is not good enough.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.mapper_file import (
    FIRST_FORMAT,
    FORMAT,
    GET_AGAIN,
    TRAIN_ONE,
    MapperConfig,
    MapperRecord,
    check_made_for,
    metadata_of,
    model_card,
    one_line,
    parse_metadata,
)

WEIGHTS = "model.safetensors"
CARD = "README.md"
BUFFERS = ("centre", "whitening", "scale")  # kept in full precision
START = 0.01  # deviation of fresh directions, as a part of scale


@dataclass(frozen=True)
class Prediction:
    """What a mapper says of a batch of targets."""

    directions: Float[Tensor, "batch num_ws w_dim"]
    expected: Float[Tensor, " batch"]
    """Transfer score each direction is expected to reach, in [-1, 1]."""


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


class Mapper(nn.Module):
    """Embeddings [batch, embed_dim] to directions [batch, num_ws, w_dim] and expected scores.

    Buffers: `centre` [embed_dim], the mean unit embedding of sources, which carries no essence
    (zeros until set); `whitening` [embed_dim, embed_dim], which brings targets to unit variance in
    every direction (until set: unit vectors to coordinates of about 1); `scale` [num_ws, w_dim],
    the deviation of directions (ones until set).
    `record` says where it comes from; None until set or loaded.
    """

    # The Hub's own mixin wants a config.json, loads what lacks weights without a word and writes
    # in place; its three methods are kept by their names alone.
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
        # Most of the way from an embedding to its direction is linear; blocks learn what is not.
        self.linear = nn.Linear(config.embed_dim, heads, bias=False)
        self.enter = nn.Linear(config.embed_dim, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.direction = nn.Linear(config.width, heads)
        # Targets differ in far fewer ways than a direction has numbers, and the matrix of the last
        # layer is what a single answer waits for.
        self.basis = None if config.rank is None else nn.Linear(heads, size, bias=False)
        self.score = nn.Linear(config.width, 1)
        nn.init.normal_(self.direction.weight, std=START / math.sqrt(config.width))
        if self.basis is not None:
            nn.init.normal_(self.basis.weight, std=1 / math.sqrt(heads))
        nn.init.zeros_(self.direction.bias)
        nn.init.zeros_(self.linear.weight)
        # As the direction has: features keep what directions need, which is not all that tells
        # how hard a target is.
        self.score_linear = nn.Linear(config.embed_dim, 1, bias=False)
        nn.init.zeros_(self.score_linear.weight)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights; computed once, so do not change them after reading it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_size(self, embeddings: Float[Tensor, "batch embed"]) -> None:
        size = self.config.embed_dim
        if embeddings.shape[1] != size:
            raise ValueError(
                f"expected embeddings of shape [batch, {size}], found {list(embeddings.shape)}: "
                f"this mapper reads those of embedder {self.config.embedder[:12]}"
            )

    def whitened(self, differences: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch embed"]:
        """What the network reads of differences between unit embeddings."""
        white: Tensor = differences.float() @ self.whitening
        return white

    def whitened_targets(
        self, embeddings: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch embed"]:
        """What the network reads of targets, from their embeddings: raw ones or unit ones."""
        return self.whitened(F.normalize(embeddings.float(), dim=1) - self.centre)

    def features(self, white: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch width"]:
        """What both heads read, of whitened differences."""
        x = self.enter(white)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def directions_of(
        self, white: Float[Tensor, "batch embed"], features: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        out = self.direction(features) + self.linear(white)
        if self.basis is not None:
            out = self.basis(out)
        shape = (self.config.num_ws, self.config.w_dim)
        directions: Tensor = out.float().unflatten(1, shape) * self.scale
        return directions

    def directions_of_differences(
        self, differences: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Directions of differences between unit embeddings, from what is to what is wanted.

        Raises:
            ValueError: embeddings of another size.
        """
        self.check_size(differences)
        white = self.whitened(differences)
        return self.directions_of(white, self.features(white))

    def forward(self, embeddings: Float[Tensor, "batch embed"]) -> Prediction:
        """Directions of targets, from their embeddings: raw ones or unit ones.

        Raises:
            ValueError: embeddings of another size.
        """
        self.check_size(embeddings)
        white = self.whitened_targets(embeddings)
        features = self.features(white)
        # Detached: knowing the score must never cost the direction.
        score = self.score(features.detach()) + self.score_linear(white)
        expected = torch.tanh(score.float()).squeeze(1)
        return Prediction(self.directions_of(white, features), expected)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        generator: str | None = None,
        embedder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Mapper":
        """A mapper from a folder, a file or a repository of the Hub; always strict, as load_mapper.

        Raises:
            FileNotFoundError: the folder has no weights, or the repository cannot be had.
            ValueError: see load_mapper.
        """
        path, name = Path(name_or_path), str(name_or_path)
        if path.is_dir():
            path = path / WEIGHTS
        elif not path.is_file():
            try:
                path = Path(hf_hub_download(name, WEIGHTS, revision=revision, token=token))
            except (OSError, HFValidationError) as error:
                raise FileNotFoundError(
                    f"{name}: expected a folder with {WEIGHTS} or a repository of the Hub, found "
                    f"{type(error).__name__}: {one_line(error)}: check the name and the network"
                ) from error
        return load_mapper(path, generator, embedder)[0]

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the weights' file and a card, over those that are there; other files stay.

        Raises:
            ValueError: no record is set, or see save_mapper.
        """
        if self.record is None:
            raise ValueError("expected a mapper with a record, found none: set mapper.record")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".unfinished-", dir=folder) as temporary:
            save_mapper(self, Path(temporary) / WEIGHTS, self.record)
            (Path(temporary) / CARD).write_text(model_card(self.config, self.record), "utf-8")
            for name in (WEIGHTS, CARD):
                os.replace(Path(temporary) / name, folder / name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push mapper",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the weights' file and a card to the Hub; the address of the commit.

        Raises:
            ValueError: no record is set, or see save_mapper.
            OSError: the Hub cannot be reached or refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=commit_message
            )
        return str(commit)


def save_mapper(
    mapper: Mapper, path: str | Path, record: MapperRecord, *, half: bool = False
) -> None:
    """Write a mapper as one safetensors file that appears whole or not at all.

    With `half` the weights, not the buffers, are rounded to half precision.

    Raises:
        ValueError: weights that are not finite (in half precision, if asked), or a record that
            JSON cannot hold. Nothing is written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for name, value in mapper.state_dict().items():
        dtype = torch.float16 if half and name not in BUFFERS else torch.float32
        tensor = tensors[name] = value.detach().to("cpu", dtype).contiguous()
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: expected finite weights, found NaN or infinity in {name}: not written"
            )
    content = save(tensors, metadata_of(mapper.config, record))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def build_mapper(config: MapperConfig, state: dict[str, Tensor], path: Path) -> Mapper:
    """A mapper with every weight from a file."""
    # No memory and no random numbers are spent on weights that are replaced at once.
    with torch.device("meta"):
        mapper = Mapper(config)
    try:
        if any(tensor.dtype not in (torch.float32, torch.float16) for tensor in state.values()):
            raise ValueError("expected floats")
        floats = {name: t.to(torch.float32, copy=True) for name, t in state.items()}
        mapper.load_state_dict(floats, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: the weights do not fit the config: {GET_AGAIN}") from error
    if not all(tensor.isfinite().all() for tensor in floats.values()):
        raise ValueError(f"{path}: the weights hold NaN or infinity: {GET_AGAIN}")
    return mapper


def load_mapper(
    path: str | Path, generator: str | None = None, embedder: str | None = None
) -> tuple[Mapper, MapperRecord]:
    """Read a mapper, for inference, and check that it belongs to a generator and an embedder.

    `generator` and `embedder` are fingerprints; None leaves a check out. The mapper is on the
    processor, in float32, its parameters frozen.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapper's file, a damaged one, or one made for another generator or
            another embedder.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such mapper file: {TRAIN_ONE}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from error
    if metadata.get("format") not in (FORMAT, FIRST_FORMAT):
        raise ValueError(
            f"{path}: expected format {FORMAT} or {FIRST_FORMAT}, found "
            f"{metadata.get('format')}: {TRAIN_ONE}"
        )
    config, record = parse_metadata(metadata, path)
    check_made_for(config, generator, embedder, str(path))
    if metadata["format"] == FIRST_FORMAT and "score_linear.weight" not in state:
        state["score_linear.weight"] = torch.zeros(1, config.embed_dim)  # scores read features
    mapper = build_mapper(config, state, path)
    mapper.record = record
    return mapper.eval().requires_grad_(False), record
