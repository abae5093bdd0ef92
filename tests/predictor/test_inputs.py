"""Pictures, targets and names of settings, as people give them in Python."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from predictor.inputs import Picture, Pictures, Text, as_pictures, as_recipe, as_target, check_mode
from targetclip.media.images import picture_to_tensor, read_picture
from targetclip.recipes import RECIPES


def pixels(seed: int = 0, height: int = 5, width: int = 7) -> "np.ndarray[Any, Any]":
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(seed))


def array_of(given: Pictures) -> "np.ndarray[Any, Any]":
    """The pixels of the only picture."""
    [found] = as_pictures(given)
    assert found.mode == "RGB"
    return np.asarray(found)


# Pictures


def test_a_path_is_read_as_people_see_it(tmp_path: Path) -> None:
    path, turned = tmp_path / "a.jpg", Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    picture().save(path, exif=turned)
    expected = np.asarray(read_picture(path))
    assert expected.shape == (7, 5, 3)
    for given in (path, str(path)):
        assert np.array_equal(array_of(given), expected)
    with Image.open(path) as opened:
        assert np.array_equal(array_of(opened), expected)


def test_words_in_the_place_of_a_path_are_told_where_both_belong() -> None:
    message = "no picture at 'green hair': check the path, or give words as text='green hair'"
    for wrong in (as_pictures, as_target):
        with pytest.raises(FileNotFoundError) as caught:
            wrong("green hair")
        assert str(caught.value) == message
    with pytest.raises(FileNotFoundError, match=r"^no picture at 'x{5000}': check"):
        as_pictures("x" * 5000)


def test_pillow_images_of_every_mode_become_rgb() -> None:
    rgb = picture()
    assert as_pictures(rgb) == [rgb]
    white = rgb.copy()
    white.info["transparency"] = rgb.getpixel((0, 0))
    assert array_of(white)[0, 0].tolist() == [255] * 3
    grey = np.asarray(rgb.convert("L"))
    assert np.array_equal(array_of(rgb.convert("L")), np.stack([grey] * 3, axis=2))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(array_of(deep), np.stack([grey] * 3, axis=2))
    palette = rgb.quantize(256)
    assert np.array_equal(array_of(palette), np.asarray(palette.convert("RGB")))
    for mode in ("1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"):
        assert array_of(Image.new(mode, (7, 5))).shape == (5, 7, 3)
    clear = rgb.convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 0))
    assert array_of(clear)[0, 0].tolist() == [255] * 3
    assert np.array_equal(array_of(clear)[1:], pixels()[1:])


def test_an_array_is_height_by_width_by_3_of_uint8_or_floats_in_0_to_1() -> None:
    assert np.array_equal(array_of(pixels()), pixels())
    for kind in (np.float16, np.float32, np.float64):
        assert np.array_equal(array_of((pixels() / 255).astype(kind)), pixels())
    flipped = pixels()[:, ::-1]  # not in the order of memory
    assert np.array_equal(array_of(flipped), flipped)


def test_a_tensor_is_3_by_height_by_width_in_minus_1_to_1() -> None:
    tensor = picture_to_tensor(picture(), 5)[0]
    expected = np.asarray(as_pictures(tensor)[0])
    middle = np.asarray(picture().crop((1, 0, 6, 5)))
    assert np.array_equal(expected, middle)
    beyond = tensor.clone()
    beyond[0, 0, 0] = 1.3  # as generators overshoot
    assert array_of(beyond)[0, 0, 0] == 255
    assert np.array_equal(array_of(tensor.double().requires_grad_()), middle)


def test_several_pictures_keep_their_order_however_they_are_given(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    picture().save(path)
    images = torch.from_numpy(np.stack([pixels(i) for i in range(3)])).permute(0, 3, 1, 2)
    tensor = images.float() / 127.5 - 1
    many: list[Pictures] = [
        np.stack([pixels(i) for i in range(3)]),
        tensor,
        [path, picture(1), pixels(2)],
        (tensor[0], tensor[1:][0], pixels(2) / 255),
        [pixels(i) for i in range(3)],
    ]
    for given in many:
        found = as_pictures(given)
        assert [np.array_equal(np.asarray(p), pixels(i)) for i, p in enumerate(found)] == [True] * 3


WRONG: list[tuple[Picture, str]] = [
    (pixels()[..., 0], r"expected an array \[height, width, 3\].*found \[5, 7\]"),
    (pixels().transpose(2, 0, 1), r"found \[3, 5, 7\]: put the channels last"),
    (pixels()[:0], r"found \[0, 7, 3\]"),
    (pixels().astype(np.int64), "expected an array of uint8 or of floats, found int64"),
    (pixels() / 1.0, r"expected floats in \[0, 1\], found 0 to 2\d\d: rescale"),
    (pixels() / 127.5 - 1, r"expected floats in \[0, 1\], found -1 to"),
    (np.full((5, 7, 3), np.nan), r"expected floats in \[0, 1\], found nan"),
    (torch.from_numpy(pixels()), r"found torch.uint8 \[5, 7, 3\]: give other layouts as an array"),
    (torch.zeros(5, 7, 3), r"expected a tensor of floats \[3, height, width\]"),
    (torch.rand(3, 5, 7), r"of pictures in \[0, 1\] give 2 \* pictures - 1"),
    (255 * torch.rand(3, 5, 7), r"expected a tensor in \[-1, 1\], found"),
    (torch.tensor([-2.1, 2.6]).repeat(3, 5, 2), r"found -2.1 to 2.6"),
    (torch.full((3, 5, 7), torch.nan), r"expected a tensor in \[-1, 1\], found nan"),
    (Image.new("F", (7, 5)), "found mode 'F' of unknown range"),
    (Image.new("RGBA", (7, 5)), "wholly transparent"),
    (Path("nowhere.png"), "no picture at 'nowhere.png'"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_could_be_read_in_two_ways_is_refused_in_one_line(
    given: Picture, message: str
) -> None:
    for wrong in (given, [picture(), given]):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            as_pictures(wrong)
        assert "\n" not in str(caught.value)


# Targets


def test_a_target_is_a_picture_or_words(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture().save(path)
    shown = as_target(str(path))
    assert isinstance(shown, Image.Image) and np.array_equal(np.asarray(shown), pixels())
    for said in (as_target(None, "a hat"), as_target(Text("a hat"))):
        assert isinstance(said, Text) and said == "a hat"
    for named in ((None, str(path)), (Text(path), None)):
        with pytest.raises(ValueError, match=r"a\.png' names a picture: give it without text="):
            as_target(*named)
    for both in ((None, None), (picture(), "a hat")):
        with pytest.raises(ValueError, match="found both or neither"):
            as_target(*both)


def test_several_targets_are_asked_for_one_by_one() -> None:
    assert np.array_equal(np.asarray(as_target(pixels()[None])), pixels())
    with pytest.raises(ValueError, match=r"expected one target, found 2: .*0\.5 \* first"):
        as_target(np.stack([pixels()] * 2))


# Names


@pytest.mark.parametrize(("name", "near"), [("optimise", "optimize"), ("Instant", "instant")])
def test_an_unknown_mode_is_refused_with_the_nearest(name: str, near: str) -> None:
    known = "instant, auto, refine, optimize"
    with pytest.raises(ValueError) as caught:
        check_mode(name)
    expected = f"mode: expected one of {known}, found {name!r}: did you mean {near!r}?"
    assert str(caught.value) == expected
    check_mode(near)


def test_a_recipe_is_itself_its_name_or_the_default() -> None:
    own, default = RECIPES["paper"], RECIPES["identity"]
    assert as_recipe(own, default) is own and as_recipe(None, default) is default
    assert as_recipe("release", default) is RECIPES["release"]
    with pytest.raises(ValueError, match="found 'relaese': did you mean 'release'"):
        as_recipe("relaese", default)
