"""Pictures: reading files of people, writing, and grids of results.

Knows the one image convention of the project: in memory NCHW float in [-1, 1], on disk HWC uint8,
always RGB. A picture carries no other metadata than a small RGB colour profile, which is written
with it. Knows nothing of generators, embedders or directions.
"""

import io
import logging
import warnings
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from targetclip.command import whole_file

logger = logging.getLogger(__name__)

# Without TIFF: its many compressions are the least tested decoders of Pillow. AVIF depends on the
# version of Pillow, and HEIC needs another library.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
READABLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADS = {  # first bytes of files
    PNG_SIGNATURE: "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "Photoshop",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
}
HEAD_BYTES = 64  # enough to tell the kind
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # lengths; other files may begin with BM, too
WRITABLE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_FILE_BYTES = 50_000_000
MAX_SIDE = 8192
MAX_TEXT_BYTES = 1_000_000  # of all text chunks of a PNG, unpacked; Pillow refuses 1 MiB in one
MAX_PROFILE_BYTES = 100_000  # of a profile that is kept
JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"

MIN_TILE, SMALL_TILE = 256, 128  # of usual sheets, and of those of more than MANY columns
MANY = 12
MAX_TILE = 512
MARGIN = 12


# The kind of a file


def picture_kind(head: bytes) -> str | None:
    """Return the name of a picture format, also of those not read, by a file's first 64 bytes."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = head[8:HEAD_BYTES]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIC" if brands[:3] in (b"hei", b"hev") or brands[:4] == b"mif1" else None
    return next((kind for start, kind in HEADS.items() if head.startswith(start)), None)


def kind_of(path: Path) -> str | None:
    """Return the picture format of a file by its content; None for others and unreadable ones."""
    try:
        with path.open("rb") as file:
            return picture_kind(file.read(HEAD_BYTES))
    except OSError:
        return None


def is_picture(path: Path) -> bool:
    """Tell whether a file is to be taken as a picture: by its suffix or, without one, its content.

    This is the one rule for folders: of the files with these suffixes `read_picture` reads all, or
    says what is wrong.
    """
    if path.suffix:
        return path.suffix.lower() in READABLE_SUFFIXES
    return kind_of(path) in READABLE_FORMATS


def refuse_picture(path: Path, expected: str) -> None:
    """Raise a ValueError if a file is a picture, where something else is expected."""
    kind = kind_of(path)
    if kind is not None:
        raise ValueError(
            f"{str(path)!r}: expected {expected}, found a picture ({kind}); give a picture as "
            "--target or --sources"
        )


# Oddities of files


def eight_bit(picture: Image.Image) -> Image.Image:
    """Rescale 16-bit grey (modes I;16 and I) to 8 bits; Pillow would clip at 255."""
    values = np.asarray(picture).astype(np.float64) / 257.0  # 65535 / 255
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def upright(picture: Image.Image, origin: str) -> Image.Image:
    """Turn a picture by its EXIF orientation."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # a broken EXIF block raises nearly anything
        logger.warning("%r: orientation not readable (%s), kept as stored", origin, error)
        return picture


def unpacked_size(kind: bytes, body: bytes) -> int:
    """Return the length of a PNG's text or profile chunk, unpacked, as far as it matters."""
    _, _, rest = body.partition(b"\0")  # its name
    packed = kind != b"tEXt"
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = b"\0".join(rest[2:].split(b"\0", 2)[2:])  # without language and translated name
    elif packed:
        rest = rest[1:]  # the method
    if not packed:
        return len(rest)
    try:
        return len(zlib.decompressobj().decompress(rest, MAX_TEXT_BYTES + 1))
    except zlib.error:  # Pillow leaves it out
        return 0


def without_large_chunks(content: bytes) -> bytes:
    """Leave out text and profile chunks of a PNG for whose size Pillow refuses the picture."""
    if not content.startswith(PNG_SIGNATURE):
        return content
    parts, place, room, unpacked = [PNG_SIGNATURE], len(PNG_SIGNATURE), MAX_TEXT_BYTES, 0
    while place < len(content):
        kind = content[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        size = 0
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = room + 1  # of those beyond the time that a picture may take
            if unpacked <= MAX_FILE_BYTES:
                size = unpacked_size(kind, content[place + 8 : end - 4])
            unpacked += size
        if size <= room:
            parts.append(content[place:end])
            room -= size
        place = end
    return b"".join(parts)


def has_every_scan(jpeg: bytes) -> bool:
    """Tell whether the scans that a JPEG begins give every coefficient in full precision.

    A progressive file is a picture after any of its scans, but a rough one.
    """
    rough: set[tuple[int, int]] = set()  # component and coefficient
    place = 2
    while (place := jpeg.find(b"\xff", place)) >= 0 and place + 4 <= len(jpeg):
        marker = jpeg[place + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # no segment follows
            place += 1
            continue
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        body = jpeg[place + 4 : end]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame
            rough = {(body[6 + 3 * i], k) for i in range(body[5]) for k in range(64)}
        elif marker == 0xDA:  # a scan
            components, (first, last, bits) = body[1 : 2 * body[0] : 2], body[2 * body[0] + 1 :]
            if bits & 15 == 0:
                rough -= {(c, k) for c in components for k in range(first, last + 1)}
        place = end
    return not rough


def with_end_marker(jpeg: bytes) -> bytes | None:
    """Return a JPEG that lacks only its end marker, with it; None if pixels may be missing too.
    OSError: there are not enough data for all pixels."""
    body = jpeg.rstrip(b"\xff")  # half of the marker
    if body.endswith(bytes(4)) or not has_every_scan(body):  # zeros are what a lost part becomes
        return None
    with Image.open(io.BytesIO(body), formats=("JPEG",)) as header:
        progressive = "progressive" in header.info
    if progressive and b"\xff\xdd" in body:  # the decoder fills up what ends at a restart marker
        return None
    # Whatever follows the last pixel makes no difference: any difference is a missing pixel.
    random, pixels = np.random.default_rng(0), set()
    for _ in range(8):
        more = random.integers(0, 255, 1000, dtype=np.uint8).tobytes()  # without 255: no marker
        content = body + more + (JPEG_END if progressive else b"")
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as picture:
            pixels.add(picture.tobytes())
    return body + JPEG_END if len(pixels) == 1 else None


def loaded(picture: Image.Image, content: bytes, origin: str) -> Image.Image:
    """Decode the pixels of an opened picture, also of a JPEG that lacks only its end marker."""
    is_jpeg = picture.format in ("JPEG", "MPO")
    try:
        picture.load()
        # Pillow decodes the zeros that are left of a broken download as if they were pixels.
        if not is_jpeg or content.rfind(JPEG_END) > content.rfind(JPEG_SCAN):
            return picture
    except OSError:
        if not is_jpeg:
            raise
    whole = with_end_marker(content)
    if whole is None:
        raise OSError("pixels are missing")
    logger.warning("%r lacks its end marker; all its pixels are there and are used", origin)
    picture = Image.open(io.BytesIO(whole), formats=READABLE_FORMATS)
    picture.load()
    return picture


def with_alpha(picture: Image.Image, depth: int) -> Image.Image:
    """Return a picture as RGBA if any of it may be transparent, otherwise as RGB.

    Args:
        depth: bits of a sample in the file. Pillow rescales samples to 8 bits, but not the value
            that stands for transparent.
    """
    clear = picture.info.get("transparency")
    if picture.mode.startswith("I"):
        values, picture = np.asarray(picture), eight_bit(picture)
        if clear is not None:
            picture.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    elif depth == 16 and isinstance(clear, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    elif depth in (2, 4) and picture.mode == "L" and clear is not None:
        picture.info["transparency"] = clear * 255 // (2**depth - 1)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def on_white(picture: Image.Image) -> Image.Image:
    """Return an RGB or RGBA picture as RGB, with a white background where it is transparent."""
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def rgb_profile(picture: Image.Image) -> bytes | None:
    """Return the colour profile of a picture if it is small and for RGB, like the picture."""
    profile = picture.info.get("icc_profile")
    if not isinstance(profile, bytes) or picture.mode not in ("RGB", "RGBA", "P"):
        return None
    fits = len(profile) <= MAX_PROFILE_BYTES
    return profile if fits and profile[16:20] == b"RGB " and profile[36:40] == b"acsp" else None


# Reading


def opened(content: bytes, origin: str) -> Image.Image:
    """Read the header of a picture file; ValueError if it is unknown, damaged or too large."""
    try:
        picture = Image.open(io.BytesIO(content), formats=READABLE_FORMATS)
    except UnidentifiedImageError as error:
        kind = picture_kind(content[:HEAD_BYTES])
        if kind is not None and kind not in READABLE_FORMATS:
            raise ValueError(
                f"{origin!r} is a picture of the kind {kind}, which is not read; save it as PNG or "
                "JPEG, for example by ImageMagick: magick FILE picture.png"
            ) from error
        raise ValueError(
            f"{origin!r} is not a picture of a known kind ({', '.join(READABLE_FORMATS)}); "
            "convert it to PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{origin!r} has more than {MAX_SIDE} px a side; make it smaller"
        ) from error
    except Exception as error:  # a damaged header raises nearly anything
        raise ValueError(
            f"{origin!r} is damaged (its header cannot be read); save it again as PNG"
        ) from error
    if max(picture.size) > MAX_SIDE:
        raise ValueError(
            f"{origin!r} is {picture.width} x {picture.height} px, more than {MAX_SIDE} a "
            "side; make it smaller"
        )
    return picture


def decode_picture(content: bytes, origin: str) -> Image.Image:
    """Decode the bytes of a picture file as `read_picture`; errors name it as `origin`.
    ValueError: empty, too large, damaged or unknown content, or nothing to be seen."""
    if not content:
        raise ValueError(f"{origin!r} is an empty file; copy or download the picture again")
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(
            f"{origin!r} is larger than {MAX_FILE_BYTES // 10**6} MB; save it smaller, e.g. as JPEG"
        )
    content = without_large_chunks(content)
    # Pillow warns of oddities in files (EXIF, palettes); a picture either decodes or is refused.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = opened(content, origin)
        try:
            # A phone's JPEG may hold previews as further frames (MPO); that is no animation.
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                logger.warning("%r is animated; its first frame is used", origin)
                picture.seek(0)
            picture = loaded(picture, content, origin)
            profile, is_bmp = rgb_profile(picture), picture.format == "BMP"
            depth = content[24] if content.startswith(PNG_SIGNATURE) else 8
            layer = with_alpha(upright(picture, origin), depth)
            seen = layer.mode == "RGB" or layer.getchannel("A").getbbox() is not None
            if is_bmp and not seen:  # its fourth byte is often unused
                layer, seen = layer.convert("RGB"), True
            rgb = on_white(layer)
        except Exception as error:  # damaged pixels raise nearly anything, too
            raise ValueError(
                f"{origin!r} is damaged or cut short; copy or download the picture again"
            ) from error
    if not seen:
        raise ValueError(
            f"{origin!r} is wholly transparent, so that nothing of it is seen; save it without "
            "transparency"
        )
    rgb.info = {} if profile is None else {"icc_profile": profile}
    return rgb


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as people see it: upright, 8-bit RGB, transparency on white.

    Of an animation the first frame is taken, and a JPEG may lack its end marker: the log warns of
    both. Colour profiles are not applied; a small one for RGB is kept as the picture's
    `info["icc_profile"]`, all other metadata is dropped. File size and picture size are checked
    before any pixel is decoded.

    FileNotFoundError: no such file. ValueError: a folder, an empty, too large, damaged or unknown
    file, or a picture that is wholly transparent.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"expected a picture, found a folder: {str(path)!r}; give the path of one file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {str(path)!r}; check the path")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)  # one byte more is too large
    return decode_picture(content, str(path))


def check_rgb(picture: Image.Image) -> None:
    """Raise a ValueError for a picture that is not RGB."""
    if picture.mode != "RGB":
        raise ValueError(f"expected an RGB picture, found mode {picture.mode!r}; use read_picture")


def center_square(picture: Image.Image) -> Image.Image:
    """Return the largest square around the middle of a picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def picture_to_tensor(picture: Image.Image, size: int) -> Float[Tensor, "1 3 {size} {size}"]:
    """Return the middle square of an RGB picture, resized with antialiasing, in [-1, 1].
    ValueError: not RGB."""
    check_rgb(picture)
    square = center_square(picture).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def tensor_to_pictures(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Return RGB pictures of images in [-1, 1]; values outside are clamped.
    ValueError: an image holds NaN or infinity."""
    images = images.detach().float().cpu()
    if not images.isfinite().all():
        raise ValueError(
            "expected images in [-1, 1], found NaN or infinity; the weights or latents are broken"
        )
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]


# Writing


def write_as(picture: Image.Image, path: Path, format_name: str) -> None:
    """Write a picture with no metadata but a small RGB profile, so that anything can open it."""
    plain = picture.copy()
    plain.info = {}
    profile = rgb_profile(picture)
    # Twice as fast as the usual 6, and 4 % larger.
    plain.save(path, format=format_name, quality=95, compress_level=4, icc_profile=profile)


def ending_of(path: Path, known: Collection[str]) -> str:
    """Return the suffix of a file to write, in lower case. ValueError: it is none of `known`."""
    if (suffix := path.suffix.lower()) not in known:
        raise ValueError(f"expected a file name ending in {', '.join(known)}, found {str(path)!r}")
    return suffix


def write_picture(picture: Image.Image, path: str | Path) -> None:
    """Write PNG, JPEG or WEBP by the suffix of `path`, whole or not at all.
    FileNotFoundError: the folder does not exist. OSError: it cannot be written. ValueError: another
    suffix."""
    path = Path(path)
    format_name = WRITABLE_FORMATS[ending_of(path, WRITABLE_FORMATS)]
    with whole_file(path) as temporary:
        write_as(picture, temporary, format_name)


def tile_side(pictures: Sequence[Image.Image], columns: int = 1) -> int:
    """Return the side of the squares that pictures are shown as, so many in a row: the side of the
    largest, within 256 to 512 px, or 128 to 512 px in rows of more than 12."""
    side = max(min(picture.size) for picture in pictures)
    return min(max(side, MIN_TILE if columns <= MANY else SMALL_TILE), MAX_TILE)


def tile_of(picture: Image.Image, side: int) -> Image.Image:
    """Return the middle square of a picture with a side of so many pixels."""
    return center_square(picture).resize((side, side), Image.Resampling.LANCZOS)


def labelled_grid(
    target: Image.Image | None,
    rows: Mapping[str, Sequence[Image.Image]],
    target_label: str = "target",
    headings: Sequence[str] = (),
) -> Image.Image:
    """Return one picture with the target on the left and a labelled row for each entry.

    `labelled_grid(target, {"sources": sources, "results, strength 1.2": results})`. Every picture
    is cut to its middle square and has the size that `tile_side` says. None: no target.

    Args:
        headings: labels of the columns, above the first row.

    Raises:
        ValueError: no picture in the rows.
    """
    pictures = [picture for row in rows.values() for picture in row]
    if not pictures:
        raise ValueError(f"expected at least one picture in the rows, found none in {list(rows)}")
    columns = max(len(row) for row in rows.values())
    tile = tile_side([*pictures, *([target] if target else [])], columns)
    font = ImageFont.load_default(size=max(16, tile // 12))
    labels = {row: " ".join(row.split()) for row in rows}
    target_label = " ".join(target_label.split())
    label_height = sum(font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (11, 2))

    # Long labels widen their column and are not cut.
    left = MARGIN
    if target is not None:
        left += MARGIN + max(tile, int(font.getlength(target_label)) + 1)
    longest = max(int(font.getlength(label)) + 1 for label in labels.values())
    width = left + max(columns * (tile + MARGIN), longest + MARGIN)
    top = MARGIN + (label_height + MARGIN if headings else 0)
    row_height = MARGIN + label_height + tile
    canvas = Image.new("RGB", (width, top + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    if target is not None:
        draw.text((MARGIN, top), target_label, fill="black", font=font)
        canvas.paste(tile_of(target, tile), (MARGIN, top + label_height))
    for column, heading in enumerate(headings):
        draw.text((left + column * (tile + MARGIN), MARGIN), heading, fill="black", font=font)
    for row, (label, row_pictures) in enumerate(rows.items()):
        y = top + row * row_height
        draw.text((left, y), labels[label], fill="black", font=font)
        for column, picture in enumerate(row_pictures):
            place = (left + column * (tile + MARGIN), y + label_height)
            canvas.paste(tile_of(picture, tile), place)
    return canvas
