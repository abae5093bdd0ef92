"""The mapper: a target's embedding to its direction, in one pass.

Knows one network, its file and how the Hub keeps such files; nothing of how it is trained, of
sources, or of what is done where its answer is not good enough.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import HFValidationError
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = "targetclip-mapper/1"
WEIGHTS = "model.safetensors"
CARD = "README.md"
TRAIN_ONE = "train a mapper for it: python -m train.mapper --help"
GET_AGAIN = "get the file again"
START = 0.01  # deviation of fresh directions, as a part of scale
# Names the Hub knows; the card calls anything else "other" and quotes the record.
HUB_LICENCES = ("mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")


def one_line(error: Exception) -> str:
    """An error's words without line breaks."""
    return " ".join(str(error).split())


@dataclass(frozen=True)
class MapperConfig:
    """Sizes of a mapper, and the two networks it belongs to.

    Raises:
        ValueError: a size that is not a whole number from 1 on, or no fingerprint.
    """

    embed_dim: int
    num_ws: int
    w_dim: int
    generator: str
    """Fingerprint of the generator its directions are for."""
    embedder: str
    """Fingerprint of the embedder whose embeddings it reads."""
    width: int = 512
    depth: int = 3
    """Residual blocks."""

    def __post_init__(self) -> None:
        for name in ("embed_dim", "num_ws", "w_dim", "width", "depth"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected a whole number from 1 on, found {size!r}")
        for name in ("generator", "embedder"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: expected a fingerprint, found {getattr(self, name)!r}")


@dataclass(frozen=True)
class MapperRecord:
    """Where a mapper comes from and what may be done with it."""

    recipe: dict[str, Any]
    """Name and settings of the objective it was trained by; anything JSON holds."""
    calibration: dict[str, float]
    """Figures that say what its expected score is worth, such as a threshold; may be empty."""
    licence: str
    trained_on: str
    version: str


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
    (zeros until set); `scale` [num_ws, w_dim], the deviation of directions (ones until set).
    `record` says where it comes from; None until set or loaded.
    """

    # The Hub's own mixin wants a config.json, loads what lacks weights without a word and writes
    # in place; its three methods are kept by their names alone.
    centre: Tensor
    scale: Tensor

    def __init__(self, config: MapperConfig) -> None:
        super().__init__()
        self.config = config
        self.record: MapperRecord | None = None
        self.register_buffer("centre", torch.zeros(config.embed_dim))
        self.register_buffer("scale", torch.ones(config.num_ws, config.w_dim))
        self.enter = nn.Linear(config.embed_dim, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.direction = nn.Linear(config.width, config.num_ws * config.w_dim)
        self.score = nn.Linear(config.width, 1)
        nn.init.normal_(self.direction.weight, std=START / math.sqrt(config.width))
        nn.init.zeros_(self.direction.bias)

    def check_size(self, embeddings: Float[Tensor, "batch embed"]) -> None:
        size = self.config.embed_dim
        if embeddings.shape[1] != size:
            raise ValueError(
                f"expected embeddings of shape [batch, {size}], found {list(embeddings.shape)}: "
                f"this mapper reads those of embedder {self.config.embedder[:12]}"
            )

    def features(self, differences: Float[Tensor, "batch embed"]) -> Float[Tensor, "batch width"]:
        """What both heads read."""
        # Coordinates of unit vectors are about 1 / sqrt(embed_dim).
        x = self.enter(differences.float() * math.sqrt(self.config.embed_dim))
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def directions_of_features(
        self, features: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        out = self.direction(features).float()
        directions: Tensor = out.unflatten(1, (self.config.num_ws, self.config.w_dim)) * self.scale
        return directions

    def directions_of_differences(
        self, differences: Float[Tensor, "batch embed"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Directions of differences between unit embeddings, from what is to what is wanted.

        Raises:
            ValueError: embeddings of another size.
        """
        self.check_size(differences)
        return self.directions_of_features(self.features(differences))

    def forward(self, embeddings: Float[Tensor, "batch embed"]) -> Prediction:
        """Directions of targets, from their embeddings: raw ones or unit ones.

        Raises:
            ValueError: embeddings of another size.
        """
        self.check_size(embeddings)
        features = self.features(F.normalize(embeddings.float(), dim=1) - self.centre)
        # Detached: knowing the score must never cost the direction.
        expected = torch.tanh(self.score(features.detach()).float()).squeeze(1)
        return Prediction(self.directions_of_features(features), expected)

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


def model_card(config: MapperConfig, record: MapperRecord) -> str:
    """README.md of a repository: what the mapper is, what it belongs to and how to load it."""
    licence = record.licence.lower() if record.licence.lower() in HUB_LICENCES else "other"
    data = ModelCardData(license=licence, library_name="targetclip")
    return f"""---
{data.to_yaml()}
---

# Mapper of targetclip

From the embedding of a target picture to a direction in the W+ of a StyleGAN2 generator, in one
pass: a source moved along it takes on the target's essence and keeps its own identity.

- Licence: {record.licence}
- Version: {record.version}
- Trained on: {record.trained_on}
- Directions: {config.num_ws} x {config.w_dim}, for generator `{config.generator}` alone
- Embeddings: {config.embed_dim} numbers, of embedder `{config.embedder}` alone

```python
from predictor.mapper import Mapper

mapper = Mapper.from_pretrained("this repository or a folder")
prediction = mapper(embeddings)  # [batch, {config.embed_dim}]
prediction.directions  # [batch, {config.num_ws}, {config.w_dim}]
prediction.expected  # transfer score each direction is expected to reach, in [-1, 1]
```

How it was trained, and what its expected score is worth:

```json
{json.dumps({"recipe": record.recipe, "calibration": record.calibration}, indent=2)}
```
"""


def metadata_of(config: MapperConfig, record: MapperRecord) -> dict[str, str]:
    """What a mapper's file says beside its weights."""
    objects = {"config": asdict(config), "recipe": record.recipe, "calibration": record.calibration}
    try:
        settings = {key: json.dumps(value, allow_nan=False) for key, value in objects.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected a record that JSON holds, found {one_line(error)}: correct the record"
        ) from error
    texts = {name: getattr(record, name) for name in ("licence", "trained_on", "version")}
    return {"format": FORMAT, **settings, **texts}


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
        dtype = torch.float16 if half and name not in ("centre", "scale") else torch.float32
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


def parse_metadata(metadata: dict[str, str], path: Path) -> tuple[MapperConfig, MapperRecord]:
    """Config and record, from what a mapper's file says beside its weights."""
    try:
        config, recipe, calibration = (
            json.loads(metadata[name]) for name in ("config", "recipe", "calibration")
        )
        if not isinstance(recipe, dict) or not isinstance(calibration, dict):
            raise ValueError("recipe or calibration is no JSON object")
        for name, figure in calibration.items():
            if type(figure) not in (int, float) or not math.isfinite(figure):
                raise ValueError(f"calibration {name} is {figure!r}")
        texts = (metadata[name] for name in ("licence", "trained_on", "version"))
        return MapperConfig(**config), MapperRecord(recipe, calibration, *texts)
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}: the metadata is damaged ({one_line(error)}): {GET_AGAIN}"
        ) from error


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
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, found {metadata.get('format')}: {TRAIN_ONE}"
        )
    config, record = parse_metadata(metadata, path)
    for name, fingerprint in (("generator", generator), ("embedder", embedder)):
        if fingerprint is not None and fingerprint != getattr(config, name):
            raise ValueError(
                f"{path} was trained for generator {config.generator[:12]} "
                f"({config.num_ws} x {config.w_dim}) and embedder {config.embedder[:12]}, but the "
                f"{name} loaded is {fingerprint[:12]}: {TRAIN_ONE}"
            )
    mapper = build_mapper(config, state, path)
    mapper.record = record
    return mapper.eval().requires_grad_(False), record
