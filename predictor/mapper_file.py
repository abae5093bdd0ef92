"""What is said of a mapper beside its weights: sizes, what it belongs to, where it comes from.

Knows the metadata of a mapper's file and the card that the Hub shows; no network and no weights.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from targetclip.recipes import RECIPES, Recipe, stored_recipe

FORMAT = "targetclip-mapper/2"
FIRST_FORMAT = "targetclip-mapper/1"  # is read as well
TRAIN_ONE = "train a mapper for it: python -m train.mapper --help"
GET_AGAIN = "get the file again"
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
    rank: int | None = None
    """Directions are mixtures of so many learned ones. None: each of their numbers is free."""

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "num_ws", "w_dim", "width", "depth")
        for name in sizes if self.rank is None else (*sizes, "rank"):
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
    """Name and settings of the objective it was trained by; anything JSON holds. `expects` says
    whether its expected score was ever taught, by the transfer term or by calibration."""
    calibration: dict[str, float]
    """Figures that say what its expected score is worth, such as a threshold; may be empty."""
    licence: str
    trained_on: str
    version: str


def check_made_for(
    config: MapperConfig, generator: str | None, embedder: str | None, name: str
) -> None:
    """Raise a ValueError where a mapper belongs to others than these fingerprints; None: any."""
    for part, fingerprint in (("generator", generator), ("embedder", embedder)):
        if fingerprint is not None and fingerprint != getattr(config, part):
            raise ValueError(
                f"{name} was trained for generator {config.generator[:12]} "
                f"({config.num_ws} x {config.w_dim}) and embedder {config.embedder[:12]}, but the "
                f"{part} loaded is {fingerprint[:12]}: {TRAIN_ONE}"
            )


def trained_recipe(record: MapperRecord | None) -> Recipe:
    """The recipe whose objective a mapper was trained by, and so what its targets look like.

    That of `train.mapper` is in its record; another mapper is taken for one of `consistent`.

    Raises:
        ValueError: the record's recipe is none.
    """
    found = {} if record is None else record.recipe.get("recipe", {})
    try:
        return stored_recipe(found) if found else RECIPES["consistent"]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the mapper was trained by a recipe unknown here ({one_line(error)}): {TRAIN_ONE}"
        ) from error


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
