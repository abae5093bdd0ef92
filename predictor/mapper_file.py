"""What goes with a mapper's weights: sizes, the networks it belongs to, its origin, the Hub.

Knows the metadata of a mapper's file, the card of a repository and how to reach the Hub; nothing of
the network or its weights.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from huggingface_hub import EvalResult, HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from predictor.tradeoff import TradeoffConfig, check_keep
from targetclip.command import one_line, write_file
from targetclip.recipes import RECIPES, Recipe
from targetclip.weights import GET_AGAIN, stored_recipe

Kept = TypeVar("Kept", bound="OnTheHub")

FORMAT = "targetclip-mapper/3"
# Of mappers that read the trade-off, so that a reader that does not know of it says so.
TRADEOFF_FORMAT = "targetclip-mapper/5"
# Read as well: the first has an expected score of features alone, neither has a correction.
FIRST_FORMAT, SECOND_FORMAT = "targetclip-mapper/1", "targetclip-mapper/2"
PLACES_FORMAT = "targetclip-mapper/4"  # a place shifts and stretches, and adds nothing to heads
FORMATS = (TRADEOFF_FORMAT, PLACES_FORMAT, FORMAT, SECOND_FORMAT, FIRST_FORMAT)
TRAIN_ONE = "train a mapper for it: python -m train.mapper --help"
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
# Files of a repository, by the names that the Hub's own mixin gives them.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
NAMED = ("embed_dim", "num_ws", "w_dim", "generator", "embedder")  # tell a mapper from others
TASK = "image-to-image"  # the nearest of the Hub's tasks: a source is edited by a target
TAGS = ["stylegan2", "clip", "image-editing", "essence-transfer"]
# Names that the Hub knows. For any other licence the card says "other" and quotes the record.
HUB_LICENCES = ("mit", "apache-2.0", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0")


def check_sizes(config: object, names: Sequence[str]) -> None:
    """Raise a ValueError for a size that is not a whole number from 1 on."""
    for name in names:
        size = getattr(config, name)
        if type(size) is not int or size < 1:
            raise ValueError(f"{name}: expected a whole number from 1 on, found {size!r}")


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Sizes of the part of a mapper that reads the source.
    ValueError: a size that is not a whole number from 1 on, or unknown layers."""

    rank: int = 96
    """Corrections are mixtures of so many learned directions."""
    width: int = 256
    """Of its two hidden layers."""
    layers: Literal["all", "first"] = "all"
    """Layers of a source's latent that are read. Those of an inverted source differ."""

    def __post_init__(self) -> None:
        check_sizes(self, ("rank", "width"))
        if self.layers not in ("all", "first"):
            raise ValueError(f"layers: expected all or first, found {self.layers!r}")


@dataclass(frozen=True, kw_only=True)
class MapperConfig:
    """Sizes of a mapper, and the two networks it belongs to.
    ValueError: a size that is not a whole number from 1 on, or a missing fingerprint."""

    embed_dim: int
    num_ws: int
    w_dim: int
    generator: str
    """Fingerprint of the generator that directions are for."""
    embedder: str
    """Fingerprint of the embedder whose embeddings are read."""
    width: int = 512
    depth: int = 3
    """Residual blocks."""
    rank: int | None = None
    """Directions are mixtures of so many learned ones. None: each of their numbers is free."""
    correction: CorrectionConfig | None = None
    """Of the correction for each source. None: there is none."""
    tradeoff: TradeoffConfig | None = None
    """Ends of the trade-off between essence and identity, if the mapper reads a place on it."""

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "num_ws", "w_dim", "width", "depth")
        check_sizes(self, sizes if self.rank is None else (*sizes, "rank"))
        for name in ("generator", "embedder"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: expected a fingerprint, found {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class MapperRecord:
    """Where a mapper comes from and what may be done with it."""

    recipe: dict[str, Any]
    """Name and settings of the training objective: anything that JSON holds. `expects` says
    whether the expected score was trained, by the transfer term or by calibration."""
    calibration: dict[str, float]
    """Figures of the expected score's worth, such as a threshold; may be empty. `keep_identity` is
    the place on the trade-off where nobody asks for one."""
    licence: str
    trained_on: str
    version: str
    command: str = ""
    """Commands that made it, a line each, without paths of their machine; empty if not known."""
    validation: dict[str, float] = field(default_factory=dict)
    """Scores on targets that it was not trained on, means over them, by the last command."""
    datasets: tuple[str, ...] = ()
    """Names on the Hub of datasets that it was trained on."""


def check_figures(figures: object, name: str) -> dict[str, float]:
    """Return figures by their names. ValueError: they are not finite numbers in an object."""
    if not isinstance(figures, dict):
        raise ValueError(f"{name} is no JSON object")
    for key, figure in figures.items():
        if type(figure) not in (int, float) or not math.isfinite(figure):
            raise ValueError(f"{name} {key} is {figure!r}")
    return figures


def check_made_for(
    config: MapperConfig, generator: str | None, embedder: str | None, name: str
) -> None:
    """Check that a mapper belongs to a generator and an embedder; a fingerprint of None fits.
    ValueError: it belongs to others. The message names the mapper as `name`."""
    for part, fingerprint in (("generator", generator), ("embedder", embedder)):
        if fingerprint is not None and fingerprint != getattr(config, part):
            raise ValueError(
                f"{name} was trained for generator {config.generator[:12]} "
                f"({config.num_ws} x {config.w_dim}) and embedder {config.embedder[:12]}, but the "
                f"{part} loaded is {fingerprint[:12]}: {TRAIN_ONE}"
            )


def trained_recipe(record: MapperRecord | None) -> Recipe:
    """Return the recipe of a mapper's training objective, which says how targets are preprocessed.

    `train.mapper` writes it into the record. A mapper without it counts as one of `consistent`.

    ValueError: the record holds something else.
    """
    settings = {} if record is None else record.recipe.get("recipe", {})
    try:
        return stored_recipe(settings) if settings else RECIPES["consistent"]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the mapper was trained by a recipe unknown here ({one_line(error)}): {TRAIN_ONE}"
        ) from error


def table_of(figures: Mapping[str, float], title: str) -> str:
    """Return figures as a table of a card; nothing where there are none."""
    if not figures:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in figures.items())
    return f"| {title} | |\n|---|---|\n{rows}\n\n"


def measured_part(record: MapperRecord) -> str:
    """Return the part of a card that says what was measured, from the record alone."""
    parts = table_of(record.validation, "score on held-out targets, mean")
    parts += table_of(record.calibration, "calibration")
    if record.command:
        parts += "By these commands, of which the last one measured:\n\n"
        parts += f"```bash\n{record.command}\n```\n\n"
    return parts or "Nothing: no figures are in its file.\n\n"


def card_header(record: MapperRecord) -> str:
    """Return the YAML of a card: what the Hub finds a model by, and scores as it lists them."""
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type="held-out-targets",
            dataset_name="Held-out targets",
            metric_type=name,
            metric_value=value,
        )
        for name, value in record.validation.items()
    ]
    data = ModelCardData(
        license=record.licence.lower() if record.licence.lower() in HUB_LICENCES else "other",
        library_name="targetclip",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=list(record.datasets) or None,
        model_name="Mapper of targetclip" if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def model_card(config: MapperConfig, record: MapperRecord) -> str:
    """Return the README.md of a repository: the mapper, its networks, how to load it, and what was
    measured."""
    more = ""
    if config.correction is not None:
        more = (
            "# To be added to a direction, for each source: latents "
            f"[sources, {config.num_ws}, {config.w_dim}]\n"
            "mapper.correct(embeddings, latents)  # "
            f"[batch, sources, {config.num_ws}, {config.w_dim}]\n"
        )
    if config.tradeoff is not None:
        more += "# 0: most essence; 1: most identity kept\nmapper(embeddings, keep=0.7)\n"
    return f"""{card_header(record)}
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
{more}```

## What was measured

{measured_part(record)}## How it was trained

```json
{json.dumps(record.recipe, indent=2)}
```
"""


def metadata_of(config: MapperConfig, record: MapperRecord) -> dict[str, str]:
    """Return the metadata of a mapper's file. ValueError: JSON cannot hold the record."""
    sizes = asdict(config)
    if config.tradeoff is None:  # then the file is as it was before there was such a key
        del sizes["tradeoff"]
    objects: dict[str, object] = {
        "config": sizes,
        "recipe": record.recipe,
        "calibration": record.calibration,
    }
    # Not in the files of former versions: what is empty stays out, so that these keep their bytes.
    more = {"validation": record.validation, "datasets": record.datasets}
    objects |= {name: value for name, value in more.items() if value}
    try:
        settings = {key: json.dumps(value, allow_nan=False) for key, value in objects.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected a record that JSON holds, found {one_line(error)}: correct the record"
        ) from error
    texts = {name: getattr(record, name) for name in ("licence", "trained_on", "version")}
    if record.command:
        texts["command"] = record.command
    written = FORMAT if config.tradeoff is None else TRADEOFF_FORMAT
    return {"format": written, **settings, **texts}


def parse_metadata(metadata: Mapping[str, str], path: Path) -> tuple[MapperConfig, MapperRecord]:
    """Return config and record from the metadata of a mapper's file.
    ValueError: an entry is missing or damaged."""
    try:
        config, recipe, calibration = (
            json.loads(metadata[name]) for name in ("config", "recipe", "calibration")
        )
        datasets = json.loads(metadata.get("datasets", "[]"))
        if not isinstance(recipe, dict):
            raise ValueError("recipe is no JSON object")
        if not isinstance(datasets, list) or not all(isinstance(name, str) for name in datasets):
            raise ValueError("datasets are no list of names")
        texts = {name: metadata[name] for name in ("licence", "trained_on", "version")}
        record = MapperRecord(
            recipe=recipe,
            calibration=check_figures(calibration, "calibration"),
            validation=check_figures(json.loads(metadata.get("validation", "{}")), "validation"),
            datasets=tuple(datasets),
            command=metadata.get("command", ""),
            **texts,
        )
        if (correction := config.get("correction")) is not None:
            config["correction"] = CorrectionConfig(**correction)
        if (tradeoff := config.get("tradeoff")) is not None:
            ends: dict[str, Any] = dict(tradeoff)
            for name in ("identity_weights", "decays"):
                ends[name] = tuple(ends[name])
            config["tradeoff"] = TradeoffConfig(**ends)
            check_keep(calibration.get("keep_identity", 0.0))
        return MapperConfig(**config), record
    except DAMAGE as error:
        raise ValueError(
            f"{path}: the metadata is damaged ({one_line(error)}): {GET_AGAIN}"
        ) from error


def read_config(path: Path) -> MapperConfig:
    """Return the entries of NAMED of a config.json; others have their defaults.
    ValueError: it is damaged."""
    try:
        settings = json.loads(path.read_text("utf-8"))
        return MapperConfig(**{name: settings[name] for name in NAMED})
    except DAMAGE as error:
        raise ValueError(f"{path}: it is damaged ({one_line(error)}): {GET_AGAIN}") from error


class OnTheHub:
    """The methods of the Hub's PyTorchModelHubMixin, for a mapper, with its names of files.

    Not that mixin itself: it takes the sizes from config.json, ignores missing weights, keeps an
    old card and writes in place. Here the weights' file alone says what it is, so that it can go
    without the others; config.json is a copy of what it says, for the Hub and other programs.
    """

    config: MapperConfig
    record: MapperRecord | None

    @classmethod
    def from_file(cls: type[Kept], path: Path, generator: str | None, embedder: str | None) -> Kept:
        """Load the weights' file; the mapper knows how."""
        raise NotImplementedError

    def to_file(self, path: Path, record: MapperRecord) -> None:
        """Write the weights' file; the mapper knows how."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls: type[Kept],
        name_or_path: str | Path,
        *,
        generator: str | None = None,
        embedder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Kept:
        """Load a mapper from a folder, a file or a repository of the Hub, checked as load_mapper.

        A mapper of another generator or embedder is refused before its weights are downloaded.

        Args:
            name_or_path: a folder or file if there is one of this name, else a repository.
            generator, embedder: fingerprints; None fits.
            revision, token, cache_dir, force_download, local_files_only: see
                `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: the folder has no weights, or the repository cannot be had.
            ValueError: see load_mapper; or config.json is of another mapper than the weights.
        """
        path, name = Path(name_or_path), str(name_or_path)
        if path.is_file():
            return cls.from_file(path, generator, embedder)

        def downloaded(file: str) -> Path:
            found = hf_hub_download(
                name,
                file,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
            return Path(found)

        try:
            found = path.joinpath if path.is_dir() else downloaded
            said = None
            with suppress(EntryNotFoundError, FileNotFoundError):  # former versions wrote none
                said = read_config(found(CONFIG))
                check_made_for(said, generator, embedder, name)
            weights = found(WEIGHTS)
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"{name}: expected a folder with {WEIGHTS} or a repository of the Hub, found "
                f"{type(error).__name__}: {one_line(error)}: check the name and the network"
            ) from error
        mapper = cls.from_file(weights, generator, embedder)
        if said is not None and any(getattr(said, n) != getattr(mapper.config, n) for n in NAMED):
            raise ValueError(
                f"{name}: expected {CONFIG} and {WEIGHTS} of one mapper, found those of two: "
                f"{GET_AGAIN}"
            )
        return mapper

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write weights, config.json and a card into a folder; other files in it stay.
        ValueError: no record is set, or see save_mapper."""
        if self.record is None:
            raise ValueError("expected a mapper with a record, found none: set mapper.record")
        folder = Path(save_directory)
        self.to_file(folder / WEIGHTS, self.record)
        settings = json.dumps(asdict(self.config), indent=2, sort_keys=True)
        write_file(folder / CONFIG, settings + "\n")
        write_file(folder / CARD, model_card(self.config, self.record))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push mapper",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload weights, config.json and a card to the Hub; return the address of the commit.

        Args:
            repo_id: name of the repository, which is made if there is none.
            private: of a new repository. None: as its owner's others.
            branch: to commit to. None: main.
            create_pr: propose the commit as a pull request.

        Raises:
            ValueError: no record is set, or see save_mapper.
            OSError: the Hub cannot be reached or refuses.
            RuntimeError: the upload of the weights broke off.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        return str(commit)
