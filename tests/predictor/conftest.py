"""What the tests of the command line share: pictures, worlds, a direction, and a way to run it."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import exit_code
from PIL import Image

from data.illustrated.avatars import draw, render
from predictor.cli import sources
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.directions import direction_bytes
from targetclip.media.alignment import Face, FaceFinder
from targetclip.world import load_scene, load_world

Run = Callable[..., int]


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A target and two sources."""
    folder = tmp_path_factory.mktemp("faces")
    paths = [folder / f"{name}.png" for name in ("target", "a", "b")]
    for i, path in enumerate(paths):
        Image.fromarray(render(draw("avataaars", {"seed": f"0-{i}"})[0], 64)).save(path)
    return paths


@pytest.fixture
def run(tiny_world: Path, faces: list[Path], tmp_path: Path) -> Run:
    """Run a command; what is not given of --world, --target, --out and --steps is small."""

    def run_command(command: str, *arguments: object, steps: int | None = 3) -> int:
        given = [str(argument) for argument in arguments]
        common = {"--world": tiny_world, "--out": tmp_path / "out"}
        target = {} if "--text" in given else {"--target": faces[0]}
        few = {} if {"--direction", "--mode", "--mapper"} & {*given} else {"--steps": steps}
        for flag, value in {**common, **target, **few}.items():
            if value is not None and not any(argument.split("=")[0] == flag for argument in given):
                given += [flag, str(value)]
        return exit_code(command, *given)

    return run_command


@pytest.fixture
def aligned_world(tiny_world: Path) -> Path:
    """The tiny world, that wants photos."""
    world = tiny_world.with_name("aligned.toml")
    world.write_text(tiny_world.read_text() + 'aligner = "ffhq"\n')
    return world


@pytest.fixture
def bare_world(tiny_world: Path) -> Path:
    """The tiny world without its inverter."""
    world = tiny_world.with_name("no_inverter.toml")
    world.write_text(re.sub("inverter = .*", "", tiny_world.read_text()))
    return world


@pytest.fixture
def unloadable_world(tiny_world: Path) -> Path:
    """The tiny world without its generator: a command that loads networks fails by that."""
    world = tiny_world.with_name("unloadable.toml")
    world.write_text(tiny_world.read_text().replace("generator.safetensors", "nowhere.safetensors"))
    return world


@pytest.fixture(scope="session")
def direction_file(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random direction of the tiny world's generator."""
    generator = load_scene(load_world(str(tiny_world))).generator
    vector = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    path.write_bytes(direction_bytes(vector, generator, {"method": "optimizer", "recipe": "paper"}))
    return path


@pytest.fixture
def tiny(tiny_world: Path) -> EssenceTransfer:
    return load_essence(str(tiny_world))


def upright_face(x: float, y: float, size: int) -> Face:
    """A face that looks into the camera, by the middle of its eyes."""
    landmarks = np.full((68, 2), (x, y), np.float64)
    landmarks[36:42, 0] -= size / 4
    landmarks[42:48, 0] += size / 4
    landmarks[[48, 54]] = (x - size / 5, y + size / 2), (x + size / 5, y + size / 2)
    left, top = round(x - size / 2), round(y - size / 3)
    return Face((left, top, left + size, top + size), landmarks)


Seeing = Callable[[Image.Image], list[tuple[float, float, int]]]


@pytest.fixture
def seeing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seeing], FaceFinder]:
    """Puts in dlib's place what knows where the faces of a picture are: x, y and size of each."""

    def put(see: Seeing) -> FaceFinder:
        class StandIn(FaceFinder):
            def __init__(self) -> None:
                pass

            def find(self, picture: Image.Image) -> list[Face]:
                return [upright_face(*place) for place in see(picture)]

        monkeypatch.setattr(sources, "FaceFinder", StandIn)
        return StandIn()

    return put
