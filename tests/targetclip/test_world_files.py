"""The files of a world: their facts, whether they are right, and fetching them."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from targetclip.world_files import (
    Facts,
    WorldFile,
    describe,
    fetch,
    fetch_missing,
    home,
    parse_facts,
    require,
    state_of,
)

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PAGE = "https://github.com/a/b"
FACTS = Facts(page=PAGE, hub="a/b:sub/g.pt", size=len(CONTENT), sha256=SHA256, licence="MIT")

Fetched = list[tuple[str, str, Path | None]]
Content = bytes | Callable[[Path], None]
Hub = Callable[[Content], Fetched]


def file_at(path: Path | None, facts: Facts = FACTS, folder: bool = False) -> WorldFile:
    return WorldFile(role="generator", name="g.pt", path=path, facts=facts, folder=folder)


def refuse(error: BaseException) -> Callable[[Path], None]:
    """Return a writer for `hub` that raises an error."""

    def write(path: Path) -> None:
        path.with_name("part").write_bytes(CONTENT[:3])
        raise error

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Make a hub that holds one content, or calls a writer, under every name.

    It records the downloads.
    """

    def make(content: Content) -> Fetched:
        asked: Fetched = []

        def download(repository: str, name: str, local_dir: Path | None = None) -> str:
            asked.append((repository, name, local_dir))
            path = (local_dir or tmp_path / "cache") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content(path) if callable(content) else path.write_bytes(content)
            return str(path)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        return asked

    return make


# Facts


def test_facts_are_read_and_all_are_optional() -> None:
    table = {"page": PAGE, "url": PAGE + "/g.pt", "size": "about 3 GB", "sha256": SHA256}
    assert parse_facts(table, "here") == Facts(
        page=PAGE, url=PAGE + "/g.pt", hub=None, size="about 3 GB", sha256=SHA256
    )
    assert parse_facts({"hub": "a/b.c:d/e+f.pt"}, "here").hub == "a/b.c:d/e+f.pt"
    assert parse_facts({}, "here") == Facts()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "here must be a table, found []"),
        ({"md5": "0"}, "here: unknown md5: expected page, url, hub, size, sha256, licence"),
        ({"licence": 1}, "here.licence must be a text, found 1"),
        ({"size": True}, "here.size must be a number of bytes or a text, found True"),
        ({"size": -1}, "here.size must be a number of bytes or a text, found -1"),
        ({"size": 1.5}, "here.size must be a number of bytes or a text, found 1.5"),
        ({"page": "github.com/a"}, "here.page must start with https://"),
        ({"url": "http://a.b/c"}, "here.url must start with https://"),
        ({"hub": "a/b"}, "here.hub must be owner/repo:file, found 'a/b'"),
        ({"hub": "a/b:/etc/g.pt"}, "here.hub must be owner/repo:file"),
        ({"hub": "a/b:c/../../g.pt"}, "here.hub must be owner/repo:file"),
        ({"sha256": "0" * 40}, "here.sha256 must be 64 hex digits"),
        ({"sha256": SHA256.upper()}, "here.sha256 must be 64 hex digits in lower case"),
    ],
)
def test_facts_with_a_mistake_are_refused_in_one_line(table: object, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_facts(table, "here")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_home_is_a_folder_of_the_user_unless_a_variable_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARGETCLIP_HOME", str(tmp_path))
    assert home() == tmp_path
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("TARGETCLIP_HOME")
        else:
            monkeypatch.setenv("TARGETCLIP_HOME", unset)
        assert home() == Path.home() / ".cache" / "targetclip"


# Whether it is there and right


def test_a_file_is_there_missing_or_wrong(tmp_path: Path) -> None:
    path = tmp_path / "g.pt"
    assert state_of(file_at(path)) == "missing"
    path.write_bytes(CONTENT[1:])
    assert state_of(file_at(path)) == "wrong size"
    path.write_bytes(CONTENT.swapcase())
    assert state_of(file_at(path)) == "wrong hash"
    assert state_of(file_at(path), hashed=False) == "there"
    assert state_of(file_at(path, Facts(size="about 7 bytes"))) == "there"
    path.write_bytes(CONTENT)
    assert state_of(file_at(path)) == "there"


def test_a_folder_in_place_of_a_file_is_not_it_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "g.pt").touch()
    assert state_of(file_at(tmp_path / "clip")) == "missing"
    assert state_of(file_at(tmp_path / "clip", folder=True)) == "there"
    assert state_of(file_at(tmp_path / "g.pt", folder=True)) == "missing"


def test_a_model_of_open_clip_is_looked_for_in_the_cache_of_the_hub() -> None:
    assert state_of(file_at(None, Facts())) == "left to open_clip"
    assert state_of(file_at(None)) == "missing"
    repository = Path(os.environ["HF_HOME"]) / "hub" / "models--a--b"
    cached = repository / "snapshots" / ("c" * 40) / "sub" / "g.pt"
    for path, content in ((cached, CONTENT), (repository / "refs" / "main", b"c" * 40)):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert state_of(file_at(None)) == "there"
    cached.write_bytes(CONTENT.swapcase())
    assert state_of(file_at(None)) == "wrong hash"
    shutil.rmtree(repository)


def test_a_description_says_all_that_is_known_and_no_more(tmp_path: Path) -> None:
    lines = describe(file_at(tmp_path / "g.pt", Facts(page=PAGE, size=12345)), "missing")
    assert lines == [
        "generator: missing: g.pt",
        f"  place: {tmp_path / 'g.pt'}",
        f"  page: {PAGE}",
        "  size: 12,345 bytes",
    ]
    text = "\n".join(describe(file_at(None), "wrong hash"))
    assert SHA256 in text and "licence: MIT" in text and "hub: a/b:sub/g.pt" in text


def test_a_file_that_is_needed_and_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "g.pt"
    with pytest.raises(FileNotFoundError) as caught:
        require(file_at(path), "mine.toml")
    assert str(caught.value) == (
        f"{path}: no such file, the generator of world mine.toml: get it from {PAGE} and put it "
        "there; see targetclip world check mine.toml --download"
    )
    with pytest.raises(FileNotFoundError, match=r"get it and put it there; .* check mine$"):
        require(file_at(path, Facts()), "mine")
    path.touch()
    require(file_at(path, Facts()), "mine")


# Fetching


def test_a_file_from_the_hub_is_put_in_its_place_and_leaves_nothing_beside_it(
    tmp_path: Path, hub: Hub
) -> None:
    asked = hub(CONTENT)
    path = tmp_path / "new" / "folder" / "g.pt"
    fetch(file_at(path))
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    [(repository, name, folder)] = asked
    assert (repository, name) == ("a/b", "sub/g.pt")
    # On the disk of its place: only there is a rename atomic.
    assert folder is not None and folder.parent == path.parent


@pytest.mark.parametrize("content", [CONTENT.swapcase(), CONTENT + b"!"], ids=["hash", "size"])
def test_a_file_from_the_hub_that_is_another_is_refused_and_nothing_is_kept(
    tmp_path: Path, hub: Hub, content: bytes
) -> None:
    hub(content)
    path = tmp_path / "new" / "g.pt"
    with pytest.raises(ValueError, match=f"a/b:sub/g.pt on the hub has the wrong .*{PAGE}$"):
        fetch(file_at(path))
    assert not list(path.parent.iterdir())


def test_a_model_for_open_clip_goes_into_the_cache_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    assert hub(CONTENT) is not None
    fetch(file_at(None))
    cached = tmp_path / "cache" / "sub" / "g.pt"
    assert cached.read_bytes() == CONTENT
    hub(CONTENT.swapcase())
    with pytest.raises(ValueError, match="wrong hash, so nothing was kept"):
        fetch(file_at(None))
    assert not cached.exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalEntryNotFoundError("Cannot find the file\nand it is offline"), "file and it is off"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_without_a_connection_the_error_is_one_line_that_says_what_to_do(
    tmp_path: Path, hub: Hub, error: Exception, said: str
) -> None:
    hub(refuse(error))
    with pytest.raises(OSError) as caught:
        fetch(file_at(tmp_path / "g.pt"))
    message = str(caught.value)
    assert said in message and PAGE in message and str(tmp_path / "g.pt") in message
    assert "\n" not in message and not (tmp_path / "g.pt").exists()


def test_an_interrupted_download_goes_on_in_the_same_folder(tmp_path: Path, hub: Hub) -> None:
    interrupted = hub(refuse(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fetch(file_at(tmp_path / "g.pt"))
    folder = interrupted[0][2]
    assert folder is not None and (folder / "sub" / "part").is_file()
    assert not (tmp_path / "g.pt").exists()
    asked = hub(CONTENT)
    fetch(file_at(tmp_path / "g.pt"))
    assert asked[0][2] == folder and not folder.exists()


def test_only_what_is_missing_and_has_a_copy_on_the_hub_is_fetched(
    tmp_path: Path, hub: Hub
) -> None:
    asked = hub(CONTENT)
    (tmp_path / "other").write_bytes(CONTENT.swapcase())  # somebody's own: not for us to replace
    names = ("missing", "other", "nowhere")
    facts = (FACTS, FACTS, Facts(page=PAGE))
    files = [file_at(tmp_path / name, its) for name, its in zip(names, facts, strict=True)]
    fetch_missing(files)
    assert len(asked) == 1 and (tmp_path / "missing").read_bytes() == CONTENT
    assert (tmp_path / "other").read_bytes() == CONTENT.swapcase()
    with pytest.raises(ValueError, match="no copy on the hub"):
        fetch(files[2])
