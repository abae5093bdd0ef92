"""The files of a world: where they belong, whether they are there and right, and fetching them.

Knows paths, their tables in a world file, and the Hugging Face hub; nothing of the content of a
file. Nothing is fetched unless `fetch` is called.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Literal

from targetclip.command import one_line, whole_file

# In the names of open_clip's models and weights
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy")
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"

HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):(\w[^:\s]*)")
SHA256 = re.compile(r"[0-9a-f]{64}")

State = Literal["there", "missing", "wrong size", "wrong hash", "left to open_clip"]
READY: tuple[State, ...] = ("there", "left to open_clip")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The table [files.ROLE] of a world file: the origin of one of its files."""

    page: str | None = None
    """Official page."""
    url: str | None = None
    """Official direct address."""
    hub: str | None = None
    """A copy on the Hugging Face hub, as owner/repo:file."""
    size: int | str | None = None
    """Bytes, or words where they are not known exactly."""
    sha256: str | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class WorldFile:
    """One file that a world needs."""

    role: str
    """Key of the world file that names it: generator, embedder and so on."""
    name: str
    """Its name in the world file."""
    path: Path | None
    """Where it belongs. None: in the hub's cache, where open_clip finds its models."""
    facts: Facts = Facts()
    folder: bool = False


def without_tilde(path: str) -> Path:
    """Return a path whose ~ is replaced by the home folder. ValueError: there is no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path!r}: found no home folder; give the whole path, or set HOME (files of worlds go "
            "to TARGETCLIP_HOME where it is set)"
        ) from error


def home() -> Path:
    """Return the folder of files that do not ship: TARGETCLIP_HOME, or ~/.cache/targetclip.
    ValueError: there is neither TARGETCLIP_HOME nor a home folder."""
    return without_tilde(os.environ.get("TARGETCLIP_HOME") or "~/.cache/targetclip")


def parse_facts(table: object, where: str) -> Facts:
    """Check a table [files.ROLE]; messages of its ValueErrors begin with `where`."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, found {table!r}")
    known = [field.name for field in fields(Facts)]
    if unknown := sorted(table.keys() - set(known)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}: expected {', '.join(known)}")
    for key, value in table.items():
        in_bytes = key == "size" and type(value) is int and value >= 0
        if not isinstance(value, str) and not in_bytes:
            expected = "a number of bytes or a text" if key == "size" else "a text"
            raise ValueError(f"{where}.{key} must be {expected}, found {value!r}")
        if key in ("page", "url") and not value.startswith("https://"):
            raise ValueError(f"{where}.{key} must start with https://, found {value!r}")
        if key == "hub" and (not HUB_FILE.fullmatch(value) or ".." in value):
            raise ValueError(f"{where}.hub must be owner/repo:file, found {value!r}")
        if key == "sha256" and not SHA256.fullmatch(value):
            raise ValueError(f"{where}.sha256 must be 64 hex digits in lower case, found {value!r}")
    return Facts(**table)


def on_hub(facts: Facts) -> tuple[str, str] | None:
    """Return repository and file of the copy on the hub."""
    match = HUB_FILE.fullmatch(facts.hub or "")
    return None if match is None else (match[1], match[2])


def present(file: WorldFile) -> Path | None:
    """Return where a file is; None if it is missing."""
    if file.path is not None:
        exists = file.path.is_dir() if file.folder else file.path.is_file()
        return file.path if exists else None
    copy = on_hub(file.facts)
    if copy is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(*copy)
    return Path(cached) if isinstance(cached, str) else None


def compared(path: Path, facts: Facts, hashed: bool = True) -> State:
    """Compare a file with its facts; `hashed` reads it whole."""
    if isinstance(facts.size, int) and path.stat().st_size != facts.size:
        return "wrong size"
    if hashed and facts.sha256 is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                return "wrong hash"
    return "there"


def state_of(file: WorldFile, hashed: bool = True) -> State:
    """Tell whether a file is there and as its facts say; without `hashed` no file is read."""
    path = present(file)
    if path is not None:
        return "there" if file.folder else compared(path, file.facts, hashed)
    # open_clip has its own list of models, and downloads one at its first use.
    return "left to open_clip" if file.path is None and file.facts.hub is None else "missing"


def place_of(file: WorldFile) -> str:
    """Return where a file belongs, for a message."""
    if file.path is not None:
        return str(file.path)
    if file.facts.hub is not None:
        return "the cache of the Hugging Face hub"
    return "open_clip's own cache, filled at its first use"


def require(file: WorldFile, world: str) -> None:
    """Raise a FileNotFoundError that says what to do, for a file that is missing.

    `world` is the value of --world.
    """
    if state_of(file, hashed=False) != "missing":
        return
    source = file.facts.page or file.facts.url
    get = f"get it from {source}" if source else "get it"
    download = " --download" if file.facts.hub else ""
    raise FileNotFoundError(
        f"{place_of(file)}: no such file, the {file.role} of world {world}: {get} and put it "
        f"there; see targetclip world check {world}{download}"
    )


def describe(file: WorldFile, state: State) -> list[str]:
    """Return lines with the state of a file, its place, and its facts."""
    facts, size = file.facts, file.facts.size
    rows = {
        "place": place_of(file),
        "page": facts.page,
        "url": facts.url,
        "hub": facts.hub,
        "size": f"{size:,} bytes" if isinstance(size, int) else size,
        "licence": facts.licence,
        "SHA-256": facts.sha256,
    }
    lines = [f"  {key}: {value}" for key, value in rows.items() if value is not None]
    return [f"{file.role}: {state}: {file.name}", *lines]


def check_files(files: Sequence[WorldFile]) -> tuple[list[str], bool]:
    """Return lines on every file, and whether all are there and right."""
    states = [state_of(file) for file in files]
    descriptions = map(describe, files, states)
    return list(chain.from_iterable(descriptions)), all(state in READY for state in states)


def downloaded(file: WorldFile, repository: str, name: str, folder: Path | None) -> Path:
    """Download from the hub into a folder, or into the hub's own cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, local_dir=folder))
    except Exception as error:  # the hub's own, and those of the libraries it uses
        reason = one_line(error)[:300] or type(error).__name__
        raise OSError(
            f"{place_of(file)}: could not be fetched from {file.facts.hub} on the hub: {reason}; "
            f"check the connection and try again, or get it from {file.facts.page or 'its page'}"
        ) from error


def fetch(file: WorldFile) -> None:
    """Download a missing file from the hub: whole and as its facts say, or not at all.
    ValueError: the facts name no copy on the hub, or the copy differs from them. OSError: it could
    not be downloaded or written. The next call continues the download."""
    copy, unfinished = on_hub(file.facts), None
    if copy is None:
        raise ValueError(f"{place_of(file)}: the world file names no copy on the hub")
    if file.path is not None:
        # An interruption leaves this folder, and the next download continues what is in it.
        unfinished = file.path.with_name(f".{file.path.name}.download")
        unfinished.mkdir(parents=True, exist_ok=True)
    fetched = downloaded(file, *copy, unfinished)
    state = compared(fetched, file.facts)
    if file.path is not None and state == "there":
        with whole_file(file.path) as temporary:
            fetched.rename(temporary)
    elif state != "there":
        fetched.resolve().unlink()  # in the hub's cache its name is a link
        fetched.unlink(missing_ok=True)
    if unfinished is not None:
        shutil.rmtree(unfinished)
    if state != "there":
        raise ValueError(
            f"{place_of(file)}: {file.facts.hub} on the hub has the {state}, so nothing was kept: "
            f"get it from {file.facts.page or 'its page'}"
        )


def fetch_missing(files: Sequence[WorldFile]) -> None:
    """Download missing files that have a copy on the hub, and print which; raises as `fetch`."""
    for file in files:
        if file.facts.hub and state_of(file, hashed=False) == "missing":
            print(f"fetching the {file.role} {file.name} from {file.facts.hub} on the hub")
            fetch(file)
