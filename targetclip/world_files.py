"""The files of a world: where each belongs, whether it is there and right, and fetching it.

Knows paths, what a world file says of them, and the Hugging Face hub; nothing of what is in a file.
Nothing is fetched unless `fetch` is called.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

# Of the names that open_clip gives to models and weights
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy")
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"

HUB_FILE = re.compile(r"([\w.-]+/[\w.-]+):(\w[^:\s]*)")
SHA256 = re.compile(r"[0-9a-f]{64}")

State = Literal["there", "missing", "wrong size", "wrong hash", "left to open_clip"]
READY: tuple[State, ...] = ("there", "left to open_clip")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a world file says of one of its files, in its table [files.ROLE]."""

    page: str | None = None
    """Official page."""
    url: str | None = None
    """Official direct address."""
    hub: str | None = None
    """A copy on the Hugging Face hub, as owner/repo:file."""
    size: int | str | None = None
    """Bytes, or in words if they are not known exactly."""
    sha256: str | None = None
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class WorldFile:
    """One file that a world needs."""

    role: str
    """Key of the world file that names it: generator, embedder and so on."""
    name: str
    """As the world file names it."""
    path: Path | None
    """Where it belongs; None: in the hub's cache, where open_clip finds its models."""
    facts: Facts = Facts()
    folder: bool = False


def home() -> Path:
    """Folder for files that do not ship: TARGETCLIP_HOME, or else ~/.cache/targetclip."""
    return Path(os.environ.get("TARGETCLIP_HOME") or "~/.cache/targetclip").expanduser()


def parse_facts(table: object, where: str) -> Facts:
    """Check a table [files.ROLE]; `where` begins the messages of its ValueErrors."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, found {table!r}")
    known = [field.name for field in fields(Facts)]
    if unknown := sorted(table.keys() - set(known)):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}: expected {', '.join(known)}")
    for key, value in table.items():
        in_bytes = key == "size" and type(value) is int and value >= 0
        if not isinstance(value, str) and not in_bytes:
            wanted = "a number of bytes or a text" if key == "size" else "a text"
            raise ValueError(f"{where}.{key} must be {wanted}, found {value!r}")
        if key in ("page", "url") and not value.startswith("https://"):
            raise ValueError(f"{where}.{key} must start with https://, found {value!r}")
        if key == "hub" and (not HUB_FILE.fullmatch(value) or ".." in value):
            raise ValueError(f"{where}.hub must be owner/repo:file, found {value!r}")
        if key == "sha256" and not SHA256.fullmatch(value):
            raise ValueError(f"{where}.sha256 must be 64 hex digits in lower case, found {value!r}")
    return Facts(**table)


def on_hub(facts: Facts) -> tuple[str, str] | None:
    """Repository and file of the copy on the hub."""
    match = HUB_FILE.fullmatch(facts.hub or "")
    return None if match is None else (match[1], match[2])


def present(file: WorldFile) -> Path | None:
    """Where a file is, if it is there."""
    if file.path is not None:
        there = file.path.is_dir() if file.folder else file.path.is_file()
        return file.path if there else None
    copy = on_hub(file.facts)
    if copy is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(*copy)
    return Path(cached) if isinstance(cached, str) else None


def compared(path: Path, facts: Facts, hashed: bool = True) -> State:
    """Whether a file is what its facts say; its hash costs reading it."""
    if isinstance(facts.size, int) and path.stat().st_size != facts.size:
        return "wrong size"
    if hashed and facts.sha256 is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                return "wrong hash"
    return "there"


def state_of(file: WorldFile, hashed: bool = True) -> State:
    """Whether a file is there and what its facts say; without `hashed` no file is read."""
    path = present(file)
    if path is not None:
        return "there" if file.folder else compared(path, file.facts, hashed)
    # open_clip keeps its own list of models, and fetches one at its first use.
    return "left to open_clip" if file.path is None and file.facts.hub is None else "missing"


def place_of(file: WorldFile) -> str:
    """Where a file belongs, in words."""
    if file.path is not None:
        return str(file.path)
    if file.facts.hub is not None:
        return "the cache of the Hugging Face hub"
    return "open_clip's own cache, filled at its first use"


def require(file: WorldFile, world: str) -> None:
    """Raise a FileNotFoundError, with what to do, for a file that is not there.

    `world` is what to give as --world.
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
    """Lines that say how a file is, where it belongs, and all that is known of it."""
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
    """Lines on each file, and whether all are there and right."""
    states = [state_of(file) for file in files]
    each = zip(files, states, strict=True)
    lines = [line for file, state in each for line in describe(file, state)]
    return lines, all(state in READY for state in states)


def downloaded(file: WorldFile, repository: str, name: str, folder: Path | None) -> Path:
    """Download from the hub into a folder, or into the hub's own cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, local_dir=folder))
    except Exception as error:  # the hub's own, and those of the libraries below it
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(
            f"{place_of(file)}: could not be fetched from {file.facts.hub} on the hub: {reason}; "
            f"check the connection and try again, or get it from {file.facts.page or 'its page'}"
        ) from error


def fetch(file: WorldFile) -> None:
    """Get a missing file from the hub: whole and as its facts say, or not there at all.

    Raises:
        ValueError: the facts name no copy on the hub, or it is not what they say.
        OSError: it could not be fetched or written; fetching again goes on with what came.
    """
    copy, unfinished = on_hub(file.facts), None
    if copy is None:
        raise ValueError(f"{place_of(file)}: the world file names no copy on the hub")
    if file.path is not None:
        # Stays after an interruption, and the next download goes on with what is in it.
        unfinished = file.path.with_name(f".{file.path.name}.download")
        unfinished.mkdir(parents=True, exist_ok=True)
    fetched = downloaded(file, *copy, unfinished)
    state = compared(fetched, file.facts)
    if file.path is not None and state == "there":
        os.replace(fetched, file.path)
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
    """Fetch what is missing and has a copy on the hub, saying what; raises as `fetch` does."""
    for file in files:
        if file.facts.hub and state_of(file, hashed=False) == "missing":
            print(f"fetching the {file.role} {file.name} from {file.facts.hub} on the hub")
            fetch(file)
