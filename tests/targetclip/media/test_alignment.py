"""Finding a face in a photo, cutting it out as FFHQ's were, and putting it back."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy import ndarray
from PIL import Image

from targetclip.media.alignment import (
    INSTALL,
    LANDMARKS,
    MODELS,
    FaceFinder,
    align,
    landmark_file,
    paste_back,
    quad_of,
    side_of,
)
from targetclip.media.images import read_picture

FIXTURES = Path(__file__).parents[2] / "fixtures"

GREY, RED = (120, 120, 120), (255, 0, 0)
ANGLES = [0, 17, 90, -45, 180]


def turned(points: ndarray, angle: float, centre: tuple[float, float] = (100, 100)) -> ndarray:
    """Points turned from the right to below, by degrees."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.asarray(centre) + (points - centre) @ np.array([[c, s], [-s, c]])


def landmarks(angle: float = 0, eyes_apart: float = 20, mouth_below: float = 24) -> ndarray:
    """68 points of a face whose eyes have their middle at (100, 100)."""
    points = np.full((68, 2), 100.0)
    circle = np.arange(6) * math.pi / 3
    ring = np.stack([2 * np.cos(circle), np.sin(circle)], axis=1)
    points[36:42] += ring - (eyes_apart / 2, 0)
    points[42:48] += ring - (-eyes_apart / 2, 0)
    points[[48, 54]] += [(-8, mouth_below), (8, mouth_below)]
    return turned(points, angle)


def quad_at(x: float, y: float, half: float, angle: float = 0) -> ndarray:
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * half + (x, y)
    return turned(corners, angle, (x, y))


def waves(width: int = 200, height: int = 200) -> Image.Image:
    """A smooth picture: what is lost of it is not lost to sharpness."""
    y, x = np.mgrid[:height, :width]
    channels = [np.sin(x / 11), np.cos(y / 13), np.sin((x + y) / 17)]
    return Image.fromarray(np.rint(127.5 + 100 * np.stack(channels, -1)).astype(np.uint8))


def noise(width: int = 90, height: int = 70) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def dotted(size: tuple[int, int], x: float, y: float) -> Image.Image:
    """Black, with a soft white dot."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    dot = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    return Image.fromarray(np.rint(dot).astype(np.uint8)).convert("RGB")


def dot_of(picture: Image.Image) -> tuple[float, float]:
    """Middle of what is white in a black picture; (0, 0) is the middle of its first pixel."""
    light = np.asarray(picture)[..., 0].astype(float)
    rows, columns = np.mgrid[: picture.height, : picture.width]
    return float((columns * light).sum() / light.sum()), float((rows * light).sum() / light.sum())


def difference(picture: Image.Image, other: Image.Image) -> ndarray:
    return np.asarray(picture).astype(int) - np.asarray(other)


def is_inside(quad: ndarray, picture: Image.Image, slack: float = 0) -> ndarray:
    """Which pixels have their middle in the quad, or no more than `slack` px beyond it."""
    rows, columns = np.mgrid[: picture.height, : picture.width]
    inside = np.ones(rows.shape, bool)
    for (x, y), (u, v) in zip(quad, np.roll(quad, -1, axis=0), strict=True):
        turn = (u - x) * (rows - y) - (v - y) * (columns - x)
        inside &= turn <= slack * math.hypot(u - x, v - y)
    return inside


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The quad


def test_an_upright_face_has_the_quad_of_the_paper() -> None:
    half, centre = 1.8 * 24, np.array([100, 100 + 0.1 * 24])
    expected = centre + half * np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)])
    np.testing.assert_allclose(quad_of(landmarks()), expected)


def test_a_face_seen_from_the_side_lies_between_its_eyes_and_its_mouth() -> None:
    points = landmarks()
    points[[48, 54]] += (6, 0)
    quad = quad_of(points)
    x = np.array([20, 0]) - (-24, 6)
    np.testing.assert_allclose((quad[3] - quad[0]) / side_of(quad), x / np.hypot(*x))
    np.testing.assert_allclose(quad.mean(axis=0), (100.6, 102.4))
    assert side_of(quad) == pytest.approx(2 * 1.8 * math.hypot(6, 24))


def test_a_wide_face_is_measured_by_its_eyes() -> None:
    assert side_of(quad_of(landmarks(eyes_apart=22))) == pytest.approx(2 * 2.0 * 22)
    assert side_of(quad_of(landmarks(eyes_apart=21))) == pytest.approx(2 * 1.8 * 24)


@pytest.mark.parametrize("angle", ANGLES)
def test_the_quad_turns_moves_and_grows_with_the_face(angle: float) -> None:
    turned_quad = quad_of(landmarks(angle))
    np.testing.assert_allclose(turned_quad, turned(quad_of(landmarks()), angle))
    np.testing.assert_allclose(quad_of(landmarks(angle) - (7, -300)), turned_quad - (7, -300))
    np.testing.assert_allclose(quad_of(3 * landmarks(angle)), 3 * turned_quad)


def test_eyes_and_mouth_corners_alone_decide() -> None:
    points = landmarks()
    others = [*range(36), *range(49, 54), *range(55, 68)]
    points[others] = np.random.default_rng(1).uniform(0, 500, (len(others), 2))
    np.testing.assert_array_equal(quad_of(points), quad_of(landmarks()))


@pytest.mark.parametrize("points", [np.zeros((68, 2)), np.full((68, 2), math.nan)])
def test_landmarks_of_no_face_are_refused(points: ndarray) -> None:
    assert "another photo" in error_of(lambda: quad_of(points))


# Cutting out


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("size", [64, 200])
def test_a_point_of_the_face_comes_to_its_place(angle: float, size: int) -> None:
    eye_of_upright = landmarks()[36:42].mean(axis=0)
    corner = quad_of(landmarks())[0]
    expected = (eye_of_upright - corner) / side_of(quad_of(landmarks())) * size - 0.5
    x, y = landmarks(angle)[36:42].mean(axis=0)
    aligned = align(dotted((220, 220), x, y), quad_of(landmarks(angle)), size)
    assert aligned.size == (size, size) and aligned.mode == "RGB"
    assert dot_of(aligned) == pytest.approx(tuple(expected), abs=0.1)


def test_the_quad_of_the_whole_picture_gives_the_picture() -> None:
    picture = waves(120, 120)
    whole = quad_at(59.5, 59.5, 60)
    assert abs(difference(align(picture, whole, 120), picture)).max() <= 4
    smaller = picture.resize((40, 40), Image.Resampling.LANCZOS)
    assert abs(difference(align(picture, whole, 40), smaller)).max() <= 4


def test_a_face_much_larger_than_the_result_is_not_skipped_over() -> None:
    y, x = np.mgrid[:400, :400]
    chess = Image.fromarray(((x + y) % 2 * 255).astype(np.uint8)).convert("RGB")
    aligned = np.asarray(align(chess, quad_at(200, 200, 120, angle=30), 12)).astype(int)
    assert abs(aligned - 127).max() <= 3


@pytest.mark.parametrize("angle", [0, 30])
@pytest.mark.parametrize("size", [20, 96])
def test_what_the_photo_shows_of_a_face_at_its_edge_stays_as_it_is(angle: float, size: int) -> None:
    large = waves()
    cut = large.crop((60, 50, 200, 170))
    quad = quad_at(100, 100, 48, angle)
    aligned, whole = align(cut, quad - (60, 50), size), align(large, quad, size)
    shown = align(Image.new("RGB", cut.size, "white"), quad - (60, 50), size)
    assert np.asarray(shown).min() == 255  # the border of a white photo is white

    place = (np.arange(size) + 0.5) / size
    u, v = place[None, :, None], place[:, None, None]
    points = quad[0] + u * (quad[3] - quad[0]) + v * (quad[1] - quad[0])
    margin = 3 + 96 / size * 3  # what filters reach over
    inside = ((points > (60 + margin, 50 + margin)) & (points < (199, 169 - margin))).all(axis=-1)
    assert 0.5 < inside.mean() < 0.95
    assert abs(difference(aligned, whole))[inside].max() <= 2
    assert abs(difference(aligned, whole))[~inside].max() > 20


def test_beyond_the_photo_its_picture_goes_on_and_fades() -> None:
    photo = noise(60, 60)
    aligned = np.asarray(align(photo, quad_at(5, 30, 40), 80)).astype(float)
    # One pixel of the photo is one of the square; the photo begins at column 34.5.
    inside, near, far = aligned[20:60, 36:70], aligned[20:60, 26:34], aligned[20:60, :8]
    assert inside.std() > 1.5 * near.std() > 3 * far.std()
    median = np.median(np.asarray(photo), axis=(0, 1))
    np.testing.assert_allclose(aligned[:, 0], np.tile(median, (80, 1)), atol=8)


def test_a_face_at_the_edge_looks_the_same_at_any_size() -> None:
    rows = np.arange(200, dtype=np.uint8)[:, None, None]
    photo, quad = Image.fromarray(np.tile(rows, (1, 200, 3))), quad_at(60, 90, 75)
    small = align(photo, quad, 15)
    smaller = align(photo, quad, 120).resize((15, 15), Image.Resampling.LANCZOS)
    assert abs(difference(small, smaller)).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (40, 1)])
@pytest.mark.parametrize("half", [0.2, 3, 500])
def test_any_small_picture_gives_a_square(size: tuple[int, int], half: float) -> None:
    aligned = align(Image.new("RGB", size, GREY), quad_at(0.5, 0.4, half, angle=10), 16)
    assert np.asarray(aligned).tolist() == [[list(GREY)] * 16] * 16


def test_what_cannot_be_cut_out_is_refused() -> None:
    photo, quad = waves(), quad_at(100, 100, 30)
    assert "RGB" in error_of(lambda: align(photo.convert("L"), quad, 8))
    assert "1 px or more, found 0" in error_of(lambda: align(photo, quad, 0))
    assert "200 x 200 px" in error_of(lambda: align(photo, quad - (0, 140), 8))
    for corners in (quad[::-1], quad[[0, 2, 1, 3]], quad * 0, quad * math.nan, quad * math.inf):
        assert "quad_of" in error_of(lambda corners=corners: align(photo, corners, 8))


# Putting back


@settings(max_examples=40, deadline=None)
@example(45.0, 35.0, 20.0, 0.0, 0.0)
@example(-0.5, 69.5, 0.3, 0.0, 0.0)
@example(89.5, -0.5, 0.3, 0.0, 1.0)
@given(
    x=st.floats(-0.4, 89.4),
    y=st.floats(-0.4, 69.4),
    half=st.floats(0.3, 80),
    angle=st.floats(-180, 180),
    softness=st.floats(0, 1),
)
def test_nothing_outside_of_the_quad_changes(
    x: float, y: float, half: float, angle: float, softness: float
) -> None:
    photo, quad = noise(), quad_at(x, y, half, angle)
    before = photo.tobytes()
    pasted = paste_back(photo, Image.new("RGB", (30, 30), RED), quad, softness)
    assert photo.tobytes() == before and pasted.size == photo.size and pasted.mode == "RGB"
    outside = ~is_inside(quad, photo, slack=1e-6)
    assert not difference(pasted, photo)[outside].any()
    if half > 8 and softness < 0.5:
        rows, columns = np.mgrid[: photo.height, : photo.width]
        middle = np.hypot(rows - y, columns - x) < 0.25 * half
        assert (np.asarray(pasted)[middle] == RED).all()


@pytest.mark.parametrize("angle", [0, 25])
@pytest.mark.parametrize("size", [48, 96, 256])
def test_the_unedited_face_put_back_changes_little(angle: float, size: int) -> None:
    photo, quad = waves(), quad_at(95.3, 101.8, 50, angle)
    change = difference(paste_back(photo, align(photo, quad, size), quad), photo)
    assert change.any() and abs(change).max() <= 6
    assert np.sqrt((change[is_inside(quad, photo)] ** 2).mean()) < 1.5


def test_a_face_at_the_edge_put_back_changes_little_up_to_the_edge() -> None:
    photo, quad = waves(), quad_at(20, 190, 60, angle=-12)
    change = difference(paste_back(photo, align(photo, quad, 128), quad), photo)
    assert change.any() and np.sqrt((change**2).mean()) < 0.5
    assert abs(change).max() <= 12 and abs(change[20:-2, 2:]).max() <= 6


def test_a_quad_in_perspective_is_put_back_as_it_was_cut_out() -> None:
    photo = waves()
    quad = np.array([[50.0, 60], [40, 150], [160, 165], [130, 45]])
    change = difference(paste_back(photo, align(photo, quad, 128), quad, 0), photo)
    assert abs(change).max() <= 6 and (change[is_inside(quad, photo)] != 0).mean() > 0.1


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("size", [50, 300])
def test_an_edit_comes_to_its_place(angle: float, size: int) -> None:
    quad = quad_at(100, 90, 50, angle)
    edited = dotted((200, 200), 70, 120).resize((size, size), Image.Resampling.LANCZOS)
    pasted = paste_back(Image.new("RGB", (200, 200)), edited, quad)
    # (70, 120) is 29.5 px left of the middle of the 200 px square and 20.5 px below it.
    expected = turned(np.array([100 - 29.5 / 2, 90 + 20.5 / 2]), angle, (100, 90))
    assert dot_of(pasted) == pytest.approx(tuple(expected), abs=0.1)


def test_a_plain_photo_stays_as_it_is_to_the_bit() -> None:
    photo, quad = Image.new("RGB", (90, 70), GREY), quad_at(40, 40, 30, angle=33)
    assert paste_back(photo, align(photo, quad, 64), quad).tobytes() == photo.tobytes()


def test_a_fine_pattern_put_back_smaller_is_not_skipped_over() -> None:
    y, x = np.mgrid[:256, :256]
    chess = Image.fromarray(((x + y) % 2 * 255).astype(np.uint8)).convert("RGB")
    quad = quad_at(50, 50, 16, angle=20)
    pasted = paste_back(Image.new("RGB", (100, 100), (127, 127, 127)), chess, quad)
    assert abs(np.asarray(pasted).astype(int) - 127).max() <= 3


def test_the_edge_fades_as_softly_as_asked() -> None:
    photo, edited = Image.new("RGB", (200, 200)), Image.new("RGB", (100, 100), "white")
    quad = quad_at(99.5, 99.5, 80)
    row = {
        softness: np.asarray(paste_back(photo, edited, quad, softness))[100, :100, 0].astype(int)
        for softness in (0, 0.3, 1)
    }
    assert set(row[0].tolist()) == {0, 255} and (row[0] == 255).sum() == 80
    for softness, steepest in ((0.3, 20), (1, 6)):
        steps = np.diff(row[softness])
        assert steps.min() >= 0 and 0 < steps.max() <= steepest
        assert (row[softness] == 255).sum() == pytest.approx(80 * (1 - softness), abs=6)
    corner = np.asarray(paste_back(photo, edited, quad, 0))[22, 22]
    assert corner.tolist() == [0, 0, 0]  # round, not sharp


def test_what_cannot_be_put_back_is_refused() -> None:
    photo, quad, face = waves(), quad_at(100, 100, 30), waves(40, 40)
    assert "40 x 30 px" in error_of(lambda: paste_back(photo, waves(40, 30), quad))
    assert "RGB" in error_of(lambda: paste_back(photo.convert("RGBA"), face, quad))
    assert "RGB" in error_of(lambda: paste_back(photo, face.convert("L"), quad))
    assert "200 x 200 px" in error_of(lambda: paste_back(photo, face, quad - (0, 140)))
    assert "quad_of" in error_of(lambda: paste_back(photo, face, quad[::-1]))
    for softness in (-0.1, 1.1, math.nan):
        message = error_of(lambda softness=softness: paste_back(photo, face, quad, softness))
        assert "from 0 to 1" in message


# Finding faces: with a stand-in for dlib everywhere, and with dlib where it is installed


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
    """The parts of dlib that are used: its detector returns `boxes`."""

    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    searched: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the pictures that the detector was given."""
    measured: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of the pictures that landmarks were looked for in."""
    rectangle: type[Rectangle] = Rectangle

    def get_frontal_face_detector(self) -> Callable[[ndarray], list[Rectangle]]:
        def detect(pixels: ndarray) -> list[Rectangle]:
            self.searched.append(pixels.shape)
            return [Rectangle(*corners) for corners in self.boxes]

        return detect

    def shape_predictor(self, path: str) -> Callable[[ndarray, Rectangle], SimpleNamespace]:
        def predict(pixels: ndarray, box: Rectangle) -> SimpleNamespace:
            self.measured.append(pixels.shape)
            points = [SimpleNamespace(x=box.left() + i, y=box.top()) for i in range(68)]
            return SimpleNamespace(parts=lambda: points)

        return predict


@pytest.fixture
def dlib(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "dlib", stand_in)
    return stand_in


def stand_in_finder() -> FaceFinder:
    """A finder of the stand-in, which reads no landmark file."""
    return FaceFinder(Path("landmarks"))


def grey(width: int = 200, height: int = 100) -> Image.Image:
    return Image.new("RGB", (width, height), "grey")


# Missing files


def test_without_dlib_no_finder_can_be_made(without: Callable[[str], None]) -> None:
    without("dlib")
    message = error_of(FaceFinder)
    assert "dlib" in message and INSTALL in message


def test_a_landmark_file_is_found_without_importing_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / MODELS
    package.mkdir()
    (package / "__init__.py").write_text("import pkg_resources_of_old")
    monkeypatch.syspath_prepend(tmp_path)
    assert INSTALL in error_of(landmark_file)
    (package / "models").mkdir()
    assert LANDMARKS in error_of(landmark_file)
    (package / "models" / LANDMARKS).write_bytes(b"landmarks")
    assert landmark_file() == package / "models" / LANDMARKS
    assert MODELS not in sys.modules


def test_without_a_landmark_file_no_finder_can_be_made(
    dlib: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / MODELS).mkdir()
    (tmp_path / MODELS / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    message = error_of(FaceFinder)
    assert LANDMARKS in message and INSTALL in message


# The finder


def test_faces_are_found_in_a_doubled_copy_and_measured_in_the_photo(dlib: StandIn) -> None:
    dlib.boxes = [(20, 40, 120, 140)]
    [face] = stand_in_finder().find(grey())
    assert dlib.searched == [(200, 400, 3)] and dlib.measured == [(100, 200, 3)]
    assert face.box == (10, 20, 60, 70) and face.size == 50
    assert face.landmarks.tolist() == [[10 + i, 20] for i in range(68)]


def test_a_large_photo_is_searched_in_a_smaller_copy(dlib: StandIn) -> None:
    dlib.boxes = [(300, 30, 600, 330)]
    [face] = stand_in_finder().find(grey(6000, 600))
    assert dlib.searched == [(300, 3000, 3)] and dlib.measured == [(600, 6000, 3)]
    assert face.box == (600, 60, 1200, 660)


def test_the_largest_face_is_the_first(dlib: StandIn) -> None:
    dlib.boxes = [(0, 0, 20, 20), (200, 0, 260, 60), (100, 0, 140, 40), (50, 0, 90, 40)]
    finder = stand_in_finder()
    faces = finder.find(grey())
    assert [face.size for face in faces] == [30, 20, 20, 10]
    dlib.boxes.reverse()
    assert [face.box for face in finder.find(grey())] == [face.box for face in faces]
    for index in range(4):
        assert finder.face_of(grey(), index).box == faces[index].box
    assert finder.face_of(grey()).size == 30


def test_a_photo_without_a_face_is_named_with_what_to_try(dlib: StandIn) -> None:
    assert stand_in_finder().find(grey()) == []
    message = error_of(lambda: stand_in_finder().face_of(grey(), origin="--sources 'me.png'"))
    assert message.startswith("--sources 'me.png': no face found in 200 x 100 px")
    assert "larger face" in message and "--no-align" in message


@pytest.mark.parametrize("index", [-1, 2, 50])
def test_a_number_that_no_face_has_is_answered_with_those_there_are(
    dlib: StandIn, index: int
) -> None:
    dlib.boxes = [(0, 0, 20, 20), (200, 0, 260, 60)]
    message = error_of(lambda: stand_in_finder().face_of(grey(), index))
    assert f"found {index};" in message
    assert "0 (30 px at (100, 0)), 1 (10 px at (0, 0))" in message


def test_a_picture_that_is_not_rgb_is_refused(dlib: StandIn) -> None:
    assert "RGB" in error_of(lambda: stand_in_finder().find(grey().convert("L")))


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


def test_a_damaged_landmark_file_is_named(finder: FaceFinder, tmp_path: Path) -> None:
    path = tmp_path / LANDMARKS
    for content in (b"", b"no landmarks", b"\0" * 1000):
        path.write_bytes(content)
        message = error_of(lambda: FaceFinder(path))
        assert str(path) in message and INSTALL in message
