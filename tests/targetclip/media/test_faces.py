"""Faces in a photo: with a stand-in for dlib everywhere, and with dlib where it is installed."""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy import ndarray
from PIL import Image

from targetclip.media import faces
from targetclip.media.alignment import align, quad_of, side_of
from targetclip.media.faces import LANDMARKS, MODELS, FaceFinder
from targetclip.media.images import read_picture

FIXTURES = Path(__file__).parents[2] / "fixtures"
INSTALL = 'pip install "targetclip[faces]"'


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Rectangle:
    def __init__(self, *corners: int) -> None:
        self.corners = corners

    def left(self) -> int:
        return self.corners[0]

    def top(self) -> int:
        return self.corners[1]

    def right(self) -> int:
        return self.corners[2]

    def bottom(self) -> int:
        return self.corners[3]


@dataclass
class StandIn:
    """As much of dlib as is used: finds the rectangles it is told to find."""

    found: list[tuple[int, int, int, int]] = field(default_factory=list)
    searched: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the pictures that the detector was given."""
    measured: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the pictures that landmarks were looked for in."""
    rectangle: type[Rectangle] = Rectangle

    def get_frontal_face_detector(self) -> Callable[[ndarray], list[Rectangle]]:
        def detect(pixels: ndarray) -> list[Rectangle]:
            self.searched.append(pixels.shape)
            return [Rectangle(*corners) for corners in self.found]

        return detect

    def shape_predictor(self, path: str) -> Callable[[ndarray, Rectangle], SimpleNamespace]:
        def predict(pixels: ndarray, box: Rectangle) -> SimpleNamespace:
            self.measured.append(pixels.shape)
            points = [SimpleNamespace(x=box.left() + i, y=box.top()) for i in range(68)]
            return SimpleNamespace(parts=lambda: points)

        return predict


@pytest.fixture
def dlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "dlib", stand_in)
    monkeypatch.setattr(faces, "landmark_file", lambda: tmp_path)
    return stand_in


def grey(width: int = 200, height: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), "grey")


# What is missing


def test_without_dlib_the_module_can_be_imported_but_no_finder_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dlib", None)
    spec = importlib.util.spec_from_file_location("faces_again", str(faces.__file__))
    assert spec is not None and spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    for module in (again, faces):
        message = error_of(module.FaceFinder)
        assert "dlib" in message and INSTALL in message


def installed(folder: Path | None) -> Callable[[str], ModuleSpec | None]:
    """A `find_spec` that knows the package of models in `folder`, or does not know it."""

    def find_spec(name: str) -> ModuleSpec | None:
        assert name == MODELS
        if folder is None:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    return find_spec


def test_a_landmark_file_is_found_without_importing_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "__init__.py").write_text("import pkg_resources_of_old")
    monkeypatch.setattr(importlib.util, "find_spec", installed(tmp_path))
    assert INSTALL in error_of(faces.landmark_file)
    (tmp_path / "models").mkdir()
    assert LANDMARKS in error_of(faces.landmark_file)
    (tmp_path / "models" / LANDMARKS).write_bytes(b"landmarks")
    assert faces.landmark_file() == tmp_path / "models" / LANDMARKS
    assert MODELS not in sys.modules


def test_without_a_landmark_file_no_finder_can_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "dlib", StandIn())
    monkeypatch.setattr(importlib.util, "find_spec", installed(None))
    message = error_of(FaceFinder)
    assert LANDMARKS in message and INSTALL in message


# What is found


def test_faces_are_found_in_a_doubled_copy_and_measured_in_the_photo(dlib: StandIn) -> None:
    dlib.found = [(20, 40, 120, 140)]
    [face] = FaceFinder().find(grey())
    assert dlib.searched == [(200, 400, 3)] and dlib.measured == [(100, 200, 3)]
    assert face.box == (10, 20, 60, 70) and face.size == 50
    assert face.landmarks.tolist() == [[10 + i, 20] for i in range(68)]


def test_a_large_photo_is_searched_in_a_smaller_copy(dlib: StandIn) -> None:
    dlib.found = [(300, 30, 600, 330)]
    [face] = FaceFinder().find(grey(6000, 600))
    assert dlib.searched == [(300, 3000, 3)] and dlib.measured == [(600, 6000, 3)]
    assert face.box == (600, 60, 1200, 660)


def test_the_largest_face_is_the_first(dlib: StandIn) -> None:
    dlib.found = [(0, 0, 20, 20), (200, 0, 260, 60), (100, 0, 140, 40), (50, 0, 90, 40)]
    finder = FaceFinder()
    found = finder.find(grey())
    assert [face.size for face in found] == [30, 20, 20, 10]
    dlib.found.reverse()
    assert [face.box for face in finder.find(grey())] == [face.box for face in found]
    for index in range(4):
        assert finder.face_of(grey(), index).box == found[index].box
    assert finder.face_of(grey()).size == 30


def test_a_photo_without_a_face_is_named_with_what_to_try(dlib: StandIn) -> None:
    assert FaceFinder().find(grey()) == []
    message = error_of(lambda: FaceFinder().face_of(grey(), origin="--sources 'me.png'"))
    assert message.startswith("--sources 'me.png': no face found in 200 x 100 px")
    assert "larger face" in message and "--no-align" in message


@pytest.mark.parametrize("index", [-1, 2, 50])
def test_a_number_that_no_face_has_is_answered_with_those_there_are(
    dlib: StandIn, index: int
) -> None:
    dlib.found = [(0, 0, 20, 20), (200, 0, 260, 60)]
    message = error_of(lambda: FaceFinder().face_of(grey(), index))
    assert f"found {index};" in message
    assert "0 (30 px at (100, 0)), 1 (10 px at (0, 0))" in message


def test_a_picture_that_is_not_rgb_is_refused(dlib: StandIn) -> None:
    assert "RGB" in error_of(lambda: FaceFinder().find(grey().convert("L")))


# dlib itself


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    pytest.importorskip("dlib", reason="the extra 'faces' is not installed")
    return FaceFinder()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return read_picture(FIXTURES / "grace_hopper.jpg")


def test_a_face_in_a_photo_is_found_with_its_eyes_and_mouth(
    finder: FaceFinder, photo: Image.Image
) -> None:
    [face] = finder.find(photo)
    assert face.size == pytest.approx(100, abs=25)
    places = {(36, 42): (112, 97), (42, 48): (155, 94), (48, 68): (134, 139)}
    for (start, end), place in places.items():
        assert face.landmarks[start:end].mean(axis=0) == pytest.approx(place, abs=5)


@pytest.mark.parametrize("angle", [-20, 20])
def test_a_turned_photo_gives_nearly_the_same_aligned_face(
    finder: FaceFinder, photo: Image.Image, angle: float
) -> None:
    turned = photo.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    quads = [quad_of(finder.face_of(picture).landmarks) for picture in (photo, turned)]
    assert side_of(quads[1]) == pytest.approx(side_of(quads[0]), rel=0.1)
    tilts = [math.degrees(math.atan2(*(quad[3] - quad[0])[::-1])) for quad in quads]
    assert tilts[0] - tilts[1] == pytest.approx(angle, abs=3)
    aligned = [
        np.asarray(align(picture, quad, 32)).astype(float)[6:26, 6:26].flatten()
        for picture, quad in zip((photo, turned), quads, strict=True)
    ]
    assert np.corrcoef(aligned)[0, 1] > 0.93


def test_two_faces_are_found_in_the_order_of_their_sizes(
    finder: FaceFinder, photo: Image.Image
) -> None:
    group = grey(700, 450)
    group.paste(photo, (10, 100))
    group.paste(photo.resize((384, 450)), (300, 0))
    large, small = finder.find(group)
    assert large.box[0] > 300 > small.box[2] and large.size > 1.2 * small.size


def test_a_photo_that_shows_no_face_has_none(finder: FaceFinder, photo: Image.Image) -> None:
    for picture in (grey(), grey(1, 1), photo.crop((0, 180, 256, 300)), photo.rotate(180)):
        assert finder.find(picture) == []


def test_a_damaged_landmark_file_is_named(
    finder: FaceFinder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / LANDMARKS
    monkeypatch.setattr(faces, "landmark_file", lambda: path)
    for content in (b"", b"no landmarks", b"\0" * 1000):
        path.write_bytes(content)
        message = error_of(FaceFinder)
        assert str(path) in message and INSTALL in message
