"""Reading what people have on disk, and the one image convention."""

import io
import logging
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from targetclip.media.images import (
    MAX_FILE_BYTES,
    MAX_PROFILE_BYTES,
    READABLE_SUFFIXES,
    center_square,
    eight_bit,
    is_picture,
    labelled_grid,
    picture_to_tensor,
    read_picture,
    tensor_to_pictures,
    write_picture,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)
ORIENTATION = 0x0112


def ramp(width: int = 24, height: int = 16) -> Image.Image:
    """A picture whose every pixel differs, so that turning or clipping it shows."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 / width, y * 255 / height, (x + y) * 3)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(picture: Image.Image, format_name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=format_name, **options)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG file."""
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with a chunk more, after its header."""
    return png[:33] + chunk(kind, body) + png[33:]


def png_row(depth: int, kind: int, samples: bytes, width: int, clear: bytes) -> bytes:
    """A PNG of one row, with a transparent value; `kind` 0 is grey and 2 is RGB."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", clear)
    return start + chunk(b"IDAT", zlib.compress(b"\0" + samples)) + chunk(b"IEND", b"")


def srgb_profile(size: int = 0, space: bytes = b"RGB ") -> bytes:
    """The profile of sRGB, filled up to a size with what cannot be packed, or of another space."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    filled = profile + np.random.default_rng(0).bytes(max(0, size - len(profile)))
    return filled[:16] + space + filled[20:]


def png_header(width: int, height: int) -> bytes:
    """A PNG that only promises its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_picture(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "BMP"])
def test_a_lossless_picture_is_read_as_it_was(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "picture"  # the content decides, not the name
    path.write_bytes(encoded(ramp(), format_name, lossless=True))
    picture = read_picture(path)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(ramp()))


def test_sixteen_bit_grey_is_rescaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    path = tmp_path / "grey.png"
    path.write_bytes(encoded(Image.fromarray(values), "PNG"))
    actual = np.asarray(read_picture(path))
    np.testing.assert_array_equal(actual, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))


def test_transparency_of_every_kind_shows_white(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (8, 8), (*RED, 255))
    picture.paste((0, 0, 255, 0), (0, 0, 4, 8))  # left half: invisible blue
    palette = picture.convert("RGB").quantize(4)
    blue = palette.getpixel((0, 0))
    contents = {
        "rgba": encoded(picture, "PNG"),
        "webp": encoded(picture, "WEBP", lossless=True),
        "palette": encoded(palette, "PNG", transparency=blue),
        "palette bytes": encoded(
            palette, "PNG", transparency=bytes([0 if i == blue else 255 for i in range(4)])
        ),
        "gif": encoded(palette, "GIF", transparency=blue),
        "rgb colour key": encoded(picture.convert("RGB"), "PNG", transparency=(0, 0, 255)),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        picture = read_picture(path)
        assert (picture.getpixel((1, 4)), picture.getpixel((6, 4))) == (WHITE, RED), name


@pytest.mark.parametrize(
    ("depth", "kind", "samples", "clear"),
    [
        (1, 0, b"\x40", b"\0\0"),
        (2, 0, b"\x60", b"\0\1"),
        (4, 0, b"\x5a", b"\0\x05"),
        (8, 0, b"\x50\xa0", b"\0\x50"),
        (16, 0, b"\x12\x34\x56\x78", b"\x12\x34"),
        (8, 2, b"\1\2\3\4\5\6", b"\0\1\0\2\0\3"),
        (16, 2, b"\x12\x34" * 3 + b"\x56\x78" * 3, b"\x12\x34" * 3),
    ],
)
def test_a_transparent_value_of_any_depth_shows_white(
    tmp_path: Path, depth: int, kind: int, samples: bytes, clear: bytes
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png_row(depth, kind, samples, 2, clear))
    picture = read_picture(path)
    assert picture.getpixel((0, 0)) == WHITE
    path.write_bytes(png_row(depth, kind, samples, 2, b"").replace(chunk(b"tRNS", b""), b""))
    opaque = read_picture(path)
    assert opaque.getpixel((1, 0)) == picture.getpixel((1, 0))
    assert opaque.getpixel((0, 0)) != WHITE


def test_of_sixteen_bits_only_the_value_itself_is_transparent(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    path.write_bytes(png_row(16, 0, struct.pack(">3H", 300, 301, 302), 3, struct.pack(">H", 301)))
    values = [read_picture(path).getpixel((x, 0)) for x in range(3)]
    assert values == [(1, 1, 1), WHITE, (1, 1, 1)]


def bmp32(alpha: int) -> bytes:
    """A 32-bit BMP with a mask for alpha, as Windows writes screenshots (header of version 4)."""
    width, height = ramp().size
    pixels = np.dstack([np.asarray(ramp())[::-1, :, ::-1], np.full((height, width), alpha)])
    body = pixels.astype(np.uint8).tobytes()
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(body), 2835, 2835, 0, 0)
    info += masks + b"sRGB" + bytes(48)
    start = 14 + len(info)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + body


@pytest.mark.parametrize("alpha", [0, 255])
def test_the_unused_fourth_byte_of_a_bmp_is_ignored(tmp_path: Path, alpha: int) -> None:
    path = tmp_path / "screenshot.bmp"
    path.write_bytes(bmp32(alpha))
    np.testing.assert_array_equal(np.asarray(read_picture(path)), np.asarray(ramp()))


def test_the_alpha_of_a_bmp_that_uses_it_counts(tmp_path: Path) -> None:
    content = bytearray(bmp32(255))
    content[-4 * ramp().width + 3] = 0  # of the first pixel of the first row, stored last
    path = tmp_path / "icon.bmp"
    path.write_bytes(content)
    assert read_picture(path).getpixel((0, 0)) == WHITE
    assert read_picture(path).getpixel((9, 9)) == ramp().getpixel((9, 9))


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "GIF"])
def test_a_wholly_transparent_picture_is_refused(tmp_path: Path, format_name: str) -> None:
    path = tmp_path / "empty"
    picture = Image.new("RGBA", (8, 8), (*RED, 0))
    path.write_bytes(encoded(picture, format_name))
    assert "wholly transparent" in error_of(path)


def test_half_transparent_grey_is_blended_with_white(tmp_path: Path) -> None:
    path = tmp_path / "la.png"
    path.write_bytes(encoded(Image.new("LA", (4, 4), (0, 128)), "PNG"))
    assert read_picture(path).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_black_and_white_and_palette_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.png"
    stored = ramp().convert(mode)
    path.write_bytes(encoded(stored, "PNG"))
    expected = np.asarray(stored.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_picture(path)), expected)


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    path.write_bytes(encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=95))
    actual = np.asarray(read_picture(path), dtype=int)
    assert abs(actual - np.array(RED)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = ramp().transpose(undo[orientation]) if orientation > 1 else ramp()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(read_picture(path)), np.asarray(ramp()))


def test_broken_exif_does_not_lose_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(ramp(), "JPEG", exif=b"Exif\0\0not a tiff header at all"))
    assert read_picture(path).size == ramp().size


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken_and_said(
    tmp_path: Path, format_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255), (0, 255, 0))]
    path = tmp_path / "moving"
    path.write_bytes(encoded(frames[0], format_name, save_all=True, append_images=frames[1:]))
    with caplog.at_level(logging.WARNING):
        actual = np.asarray(read_picture(path), dtype=int)
    assert abs(actual - np.array(RED)).max() < 8
    assert "animated" in caplog.text and str(path) in caplog.text


def test_a_photo_with_a_preview_is_not_called_an_animation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "phone.jpg"
    small = ramp().resize((6, 4))
    path.write_bytes(encoded(ramp(), "MPO", save_all=True, append_images=[small]))
    assert read_picture(path).size == ramp().size
    assert not caplog.records


def test_paths_that_are_no_picture_are_refused_in_one_line(tmp_path: Path) -> None:
    empty, text, script = (tmp_path / name for name in ("empty.png", "notes.png", "drawing.eps"))
    empty.write_bytes(b"")
    text.write_text("not a picture")
    script.write_bytes(encoded(ramp(), "EPS"))
    assert "check the path" in error_of(tmp_path / "nobody.png")
    assert "folder" in error_of(tmp_path)
    assert "empty" in error_of(empty)
    assert "PNG, JPEG" in error_of(text)
    for name in ("TIFF", "AVIF"):
        path = tmp_path / f"picture.{name.lower()}"
        path.write_bytes(encoded(ramp(), name))
        assert f"of the kind {name}, which is not read" in error_of(path)
        assert "magick" in error_of(path)
    phone = tmp_path / "IMG_1.HEIC"
    phone.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert "of the kind HEIC" in error_of(phone)
    assert "convert it to PNG" in error_of(script)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"tEXt", b"Comment\0" + b"a" * 3_000_000),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)),
        (b"iTXt", b"Comment\0\0\0en\0c\0" + b"a" * 3_000_000),
        (b"iCCP", b"sRGB\0\0" + zlib.compress(srgb_profile(3_000_000))),
        (b"zTXt", b"Comment\0\0" + b"not packed"),
    ],
)
@pytest.mark.parametrize("times", [1, 30])
def test_large_texts_and_profiles_of_a_png_do_not_hide_its_pixels(
    tmp_path: Path, kind: bytes, body: bytes, times: int
) -> None:
    content = encoded(ramp(), "PNG")
    for _ in range(times if len(body) < 100_000 else 1):
        content = with_chunk(content, kind, body)
    path = tmp_path / "large.png"
    path.write_bytes(content)
    picture = read_picture(path)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(ramp()))
    assert picture.info == {}


def test_an_orientation_in_a_small_text_is_kept_beside_a_large_one(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    content = with_chunk(encoded(ramp(), "PNG"), b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20)))
    content = with_chunk(content, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    path = tmp_path / "turned.png"
    path.write_bytes(content)
    assert read_picture(path).size == (ramp().height, ramp().width)


NOISE = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
JPEGS: list[dict[str, object]] = [
    {},
    {"progressive": True},
    {"optimize": True, "subsampling": 0},
    {"quality": 100, "restart_marker_blocks": 1},
    {"subsampling": 2, "quality": 30},
]


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("pixels", [NOISE, np.asarray(ramp()), NOISE[..., 0]])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_jpeg_that_lacks_only_its_end_marker_is_read_and_said(
    tmp_path: Path,
    options: dict[str, object],
    pixels: np.ndarray,
    lost: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = encoded(Image.fromarray(pixels), "JPEG", **options)
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    whole.write_bytes(content)
    cut.write_bytes(content[:-lost])
    expected = np.asarray(read_picture(whole))
    assert not caplog.records
    np.testing.assert_array_equal(np.asarray(read_picture(cut)), expected)
    assert "lacks its end marker" in caplog.text and str(cut) in caplog.text


@pytest.mark.parametrize("options", JPEGS)
def test_a_jpeg_cut_anywhere_before_its_end_marker_is_refused(
    tmp_path: Path, options: dict[str, object]
) -> None:
    content = encoded(Image.fromarray(NOISE), "JPEG", **options)
    path = tmp_path / "cut.jpg"
    for kept in [*range(3, len(content) - 40, 19), *range(len(content) - 40, len(content) - 2)]:
        for zeros in (0, max(4, len(content) - kept)):  # a broken download may leave zeros
            path.write_bytes(content[:kept] + bytes(zeros))
            message = error_of(path)
            assert "damaged" in message or "known kind" in message


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_cut_file_is_refused(tmp_path: Path, format_name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), format_name)
    path = tmp_path / "cut"
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in error_of(path)


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: takes no room on the disk
    assert "larger than 50 MB" in error_of(path)


@pytest.mark.parametrize(
    ("width", "height"), [(8193, 8), (8, 8193), (9500, 9500), (60000, 60000), (2**31 - 1, 1)]
)
def test_a_picture_of_too_many_pixels_is_refused_undecoded(
    tmp_path: Path, width: int, height: int
) -> None:
    path = tmp_path / "bomb.png"  # decoding it would give another error: it holds no pixels
    path.write_bytes(png_header(width, height))
    assert "make it smaller" in error_of(path)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
def test_any_damage_gives_a_picture_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, format_name: str, data: st.DataObject
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = bytearray(encoded(ramp(), format_name, exif=exif))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert read_picture(path).mode == "RGB"
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_pictures_of_a_folder_are_told_by_suffix_or_without_one_by_content(tmp_path: Path) -> None:
    for suffix in READABLE_SUFFIXES:
        assert is_picture(tmp_path / f"a{suffix}") and is_picture(tmp_path / f"A{suffix.upper()}")
    for name in ("a.tif", "a.avif", "a.heic", "notes.txt", "a.png.zip", "a.mp4", "missing"):
        assert not is_picture(tmp_path / name)
    for format_name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"):
        path = tmp_path / format_name
        path.write_bytes(encoded(ramp(), format_name))
        assert is_picture(path) == (format_name not in ("TIFF", "AVIF"))
        if is_picture(path):
            read_picture(path)
    (tmp_path / "LICENSE").write_text("BSD")
    (tmp_path / "CARS").write_text("BMW and others are no pictures, as a BMP would be.")
    assert not is_picture(tmp_path / "CARS")
    (tmp_path / "folder").mkdir()
    assert not is_picture(tmp_path / "LICENSE") and not is_picture(tmp_path / "folder")


def test_pictures_survive_the_way_to_tensors_and_back_exactly() -> None:
    picture = ramp(16, 16)
    tensor = picture_to_tensor(picture, 16)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(np.asarray(tensor_to_pictures(tensor)[0]), np.asarray(picture))


def test_black_is_minus_one_and_white_is_one() -> None:
    picture = Image.new("RGB", (4, 4), WHITE)
    picture.paste((0, 0, 0), (0, 0, 2, 4))
    tensor = picture_to_tensor(picture, 4)
    assert tensor[..., :2].eq(-1).all() and tensor[..., 2:].eq(1).all()


def test_only_the_middle_square_is_kept() -> None:
    picture = Image.new("RGB", (30, 10), WHITE)
    picture.paste(RED, (10, 0, 20, 10))
    square = center_square(picture)
    assert square.size == (10, 10) and square.getcolors() == [(100, RED)]
    assert center_square(picture.transpose(Image.Transpose.ROTATE_90)).getcolors() == [(100, RED)]
    assert picture_to_tensor(picture, 5)[0, 1].eq(-1).all()  # no green: no white


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    tensor = picture_to_tensor(Image.fromarray(stripes), 8)
    assert tensor.abs().max() < 0.1  # grey, not stripes of another width


def test_values_out_of_range_are_clamped_and_nan_is_refused() -> None:
    [picture] = tensor_to_pictures(torch.tensor([-5.0, 0.0, 5.0]).view(1, 3, 1, 1))
    assert picture.getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match="NaN"):
        tensor_to_pictures(torch.full((1, 3, 2, 2), float("nan")))


def test_a_tensor_wants_an_rgb_picture() -> None:
    with pytest.raises(ValueError, match="read_picture"):
        picture_to_tensor(Image.new("RGBA", (4, 4)), 4)


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "a.webp"])
def test_a_written_picture_can_be_read_and_nothing_else_is_left(tmp_path: Path, name: str) -> None:
    write_picture(ramp(64, 64), tmp_path / name)
    difference = np.asarray(read_picture(tmp_path / name), dtype=int) - np.asarray(ramp(64, 64))
    assert abs(difference).mean() < 3
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("size", [0, MAX_PROFILE_BYTES, MAX_PROFILE_BYTES + 1, 3_000_000])
def test_a_small_rgb_profile_is_kept_and_a_large_one_is_not(
    tmp_path: Path, name: str, size: int
) -> None:
    profile = srgb_profile(size)
    source = tmp_path / "source.jpg"
    source.write_bytes(encoded(ramp(), "JPEG", icc_profile=profile, comment=b"a" * 60_000))
    picture = read_picture(source)
    write_picture(picture.crop((2, 2, 12, 12)), tmp_path / name)
    unread = ramp()  # as a caller of Python may have it
    unread.info = {"icc_profile": profile, "comment": b"a", "exif": b"a" * 70_000}
    write_picture(unread, tmp_path / f"unread_{name}")
    for path in (tmp_path / name, tmp_path / f"unread_{name}"):
        read_picture(path)
        with Image.open(path) as written:
            kept = written.info.get("icc_profile")
            written.load()
        assert kept == (profile if size <= MAX_PROFILE_BYTES else None)
        assert path.stat().st_size < 3000 + (size if kept else 0)


@pytest.mark.parametrize(("mode", "space"), [("CMYK", b"CMYK"), ("L", b"GRAY"), ("RGB", b"CMYK")])
def test_the_profile_of_another_colour_space_is_not_kept(
    tmp_path: Path, mode: str, space: bytes
) -> None:
    source = tmp_path / "source.jpg"
    stored = ramp().convert(mode)
    source.write_bytes(encoded(stored, "JPEG", icc_profile=srgb_profile(space=space)))
    picture = read_picture(source)
    assert picture.mode == "RGB" and picture.info == {}
    write_picture(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert written.info == {}


def test_what_is_written_carries_no_texts_and_no_transparent_value(tmp_path: Path) -> None:
    information = PngImagePlugin.PngInfo()
    information.add_text("Comment", "a" * 500_000, zip=True)
    source = tmp_path / "source.png"
    source.write_bytes(encoded(ramp(), "PNG", pnginfo=information, transparency=(1, 2, 3)))
    write_picture(read_picture(source), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert written.info == {} and written.mode == "RGB"


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_picture(ramp(), path)
    before = path.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="free some space"):
            write_picture(Image.fromarray(noise), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_writing_asks_for_a_known_suffix_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png.*'.*a\.tga'"):
        write_picture(ramp(), tmp_path / "a.tga")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_picture(ramp(), tmp_path / "nowhere" / "a.png")


def column_of(picture: Image.Image, x: int) -> set[tuple[int, int, int]]:
    return {tuple(color) for color in np.asarray(picture)[:, x].tolist()}


@pytest.mark.parametrize("side", [16, 128, 700])
def test_the_grid_shows_target_and_rows_at_a_visible_size(side: int) -> None:
    def plain(color: tuple[int, int, int]) -> Image.Image:
        return Image.new("RGB", (side, side), color)

    blue, green, gold = (0, 0, 255), (0, 255, 0), (255, 200, 0)
    grid = labelled_grid(
        plain(RED), {"sources": [plain(blue)] * 3, "results": [plain(green), plain(gold)]}
    )
    tile = min(max(side, 256), 512)
    counts = {color: count for count, color in grid.getcolors(grid.width * grid.height) or []}
    assert counts[RED] == tile**2 and counts[blue] == 3 * tile**2
    assert counts[green] == counts[gold] == tile**2
    left = 12 + tile // 2  # middle of the target's column, then of the first two pairs
    first, second = left + tile + 12, left + 2 * (tile + 12)
    assert RED in column_of(grid, left)
    assert {blue, green} <= column_of(grid, first) and {blue, gold} <= column_of(grid, second)
    assert any(max(color) < 60 for color in counts)  # black letters


def test_a_long_label_is_not_cut() -> None:
    tile = Image.new("RGB", (128, 128), RED)

    def darkest(label: str) -> int:
        grid = np.asarray(labelled_grid(tile, {label: [tile]}))
        return int((grid.max(axis=2) < 60).any(axis=0).nonzero()[0].max())

    # The last letter of the longer label lies further right, and inside the picture.
    assert (
        darkest("results, strength 1.2, by the optimizer") > darkest("results, strength 1.2") + 50
    )


def test_a_sheet_of_many_columns_has_smaller_tiles() -> None:
    few, many = ([Image.new("RGB", (64, 64), RED)] * count for count in (12, 13))
    assert labelled_grid(None, {"": few}).width > 12 * 256
    assert labelled_grid(None, {"": many}).width < 13 * 145


def test_headings_stand_above_their_columns_and_below_them_all_is_as_before() -> None:
    rows = {"ada": [Image.new("RGB", (64, 64), RED)] * 3}
    bare, headed = (
        np.asarray(labelled_grid(None, rows, headings=headings))
        for headings in ((), ("strength 0", "", "strength 1"))
    )
    below = headed[len(headed) - len(bare) + 1 :]
    np.testing.assert_array_equal(below, bare[1:])
    dark = (headed[: len(headed) - len(bare)].max(axis=2) < 60).any(axis=0).nonzero()[0]
    columns = {int(x - 12) // (256 + 12) for x in dark}
    assert columns == {0, 2}


def test_a_grid_without_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        labelled_grid(ramp(), {"sources": [], "results": []})


@pytest.mark.parametrize("mode", ["I", "I;16B"])
def test_other_sixteen_bit_modes_are_rescaled_too(
    mode: str,
) -> None:
    stored = Image.new(mode, (2, 2), 65535)
    make: Callable[[Image.Image], Image.Image] = eight_bit
    assert make(stored).getcolors() == [(4, 255)]
