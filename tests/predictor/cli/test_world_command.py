"""The commands `targetclip world list` and `targetclip world check`."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import exit_code, one_line

CONTENT = b"weights of a network"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WORLD = f"""name = "mine"
generator = "g.pt"
embedder = "clip"

[files.generator]
page = "https://github.com/a/b"
hub = "a/b:g.pt"
size = {len(CONTENT)}
sha256 = "{SHA256}"
licence = "MIT"
"""

World = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def world(capsys: pytest.CaptureFixture[str]) -> World:
    """Run `targetclip world`: its exit code, its lines, and what it said of errors."""

    def run(*arguments: object) -> tuple[int, list[str], str]:
        code = exit_code("world", *arguments)
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A world file; its generator is not there."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "mine.toml").write_text(WORLD)
    return tmp_path / "mine.toml"


@pytest.fixture(autouse=True)
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own files are not seen."""
    monkeypatch.setenv("TARGETCLIP_HOME", str(tmp_path / "home"))


def holding(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hub hold this content."""

    def download(repository: str, name: str, local_dir: Path) -> str:
        (local_dir / name).write_bytes(content)
        return str(local_dir / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def test_the_list_has_a_line_for_each_world_and_says_what_is_missing(
    world: World, tmp_path: Path
) -> None:
    code, lines, errors = world("list")
    assert (code, errors) == (0, "")
    [photographs] = [line for line in lines if line.startswith("ffhq1024: ")]
    assert photographs == (
        "ffhq1024: photographs of faces, 1024 px: lacks generator, embedder, inverter, identity: "
        "targetclip world check ffhq1024"
    )
    [drawn] = [line for line in lines if line.startswith("avatars: ")]
    assert drawn.endswith(": ready")
    (tmp_path / "home" / "ffhq1024").mkdir(parents=True)
    (tmp_path / "home" / "ffhq1024" / "stylegan2-ffhq-config-f.pt").touch()
    assert "lacks embedder, inverter, identity" in "\n".join(world("list")[1])


def test_a_world_that_ships_is_ready(world: World) -> None:
    code, lines, _ = world("check", "avatars")
    assert code == 0 and lines[-1] == "avatars: ready"
    heads = [line for line in lines[:-1] if not line.startswith(" ")]
    assert heads[0] == "generator: there: generator.safetensors"
    assert len(heads) >= 4 and all(": there: " in head for head in heads)


def test_a_check_says_where_to_get_what_is_missing_and_where_to_put_it(
    world: World, path: Path
) -> None:
    code, lines, errors = world("check", path)
    assert (code, errors) == (1, "")
    assert lines == [
        "generator: missing: g.pt",
        f"  place: {path.with_name('g.pt')}",
        "  page: https://github.com/a/b",
        "  hub: a/b:g.pt",
        f"  size: {len(CONTENT)} bytes",
        "  licence: MIT",
        f"  SHA-256: {SHA256}",
        "embedder: there: clip",
        f"  place: {path.with_name('clip')}",
        "mine: not ready",
    ]


@pytest.mark.parametrize(
    ("content", "state", "code"),
    [
        (CONTENT, "there", 0),
        (CONTENT[:5], "wrong size", 1),
        (CONTENT.swapcase(), "wrong hash", 1),
    ],
)
def test_a_check_holds_files_against_their_size_and_hash(
    world: World, path: Path, content: bytes, state: str, code: int
) -> None:
    path.with_name("g.pt").write_bytes(content)
    found, lines, _ = world("check", path)
    assert (found, lines[0]) == (code, f"generator: {state}: g.pt")
    # What is there is never replaced, right or wrong.
    assert world("check", path, "--download")[0] == code
    assert path.with_name("g.pt").read_bytes() == content


def test_a_download_is_checked_and_makes_the_world_ready(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(CONTENT, monkeypatch)
    code, lines, _ = world("check", path, "--download")
    assert code == 0 and lines[0] == "fetching the generator g.pt from a/b:g.pt on the hub"
    assert lines[1] == "generator: there: g.pt" and lines[-1] == "mine: ready"
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["clip", "g.pt", "mine.toml"]


def test_a_download_of_something_else_is_refused_in_one_line(
    world: World, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holding(CONTENT.swapcase(), monkeypatch)
    code, _, errors = world("check", path, "--download")
    assert code == 1 and "wrong hash, so nothing was kept" in one_line(errors)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["clip", "mine.toml"]


def test_a_download_without_a_connection_is_refused_in_one_line(world: World, path: Path) -> None:
    code, _, errors = world("check", path, "--download")
    assert code == 1 and "; check the connection and try again" in one_line(errors)


def test_a_world_that_is_ready_by_the_check_can_be_used(
    world: World, tiny_world: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_world.parent, tmp_path / "world")
    path = tmp_path / "world" / "world.toml"
    assert world("check", path)[0] == 0
    arguments = ["--text", "a hat", "--num-sources", "1", "--steps", "1", "--initial", "zero"]
    path.write_text(tiny_world.read_text() + 'neutral = ["a face", "a head"]\n')
    assert exit_code("transfer", "--world", path, "--out", tmp_path / "out", *arguments) == 0
    assert (tmp_path / "out" / "grid.png").is_file()


def test_using_a_world_whose_files_are_missing_names_the_check(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Path(__file__).parents[3] / "examples" / "joker.png"
    arguments = ("--world", path, "--target", picture, "--out", path.with_name("out"))
    assert exit_code("optimize", *arguments) == 1
    line = one_line(capsys.readouterr().err)
    assert f"{path.with_name('g.pt')}: no such file" in line
    assert line.endswith(f"targetclip world check {path} --download")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "{list, check}"),
        (["guess"], 2, "guess"),
        (["check"], 2, "WORLD"),
        (["check", "guess"], 1, "unknown world 'guess': expected avatars, ffhq1024"),
        (["check", "guess.toml"], 1, "guess.toml: no such world file"),
        (["check", "avatars", "--guess"], 2, "--guess"),
        (["list", "--download"], 2, "--download"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    world: World, arguments: list[str], code: int, said: str
) -> None:
    found, lines, errors = world(*arguments)
    assert (found, lines) == (code, []) and said in one_line(errors)
