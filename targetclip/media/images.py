"""Pictures: reading files of people, writing, and grids of results.

Knows the one image convention of the project: in memory NCHW float in [-1, 1], on disk HWC uint8,
always RGB. Knows nothing of generators, embedders or directions.
"""

import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from targetclip.command import whole_file

logger = logging.getLogger(__name__)

# Without TIFF: its many compressions are the least tested decoders of Pillow.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
WRITABLE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_FILE_BYTES = 50_000_000
MAX_SIDE = 8192

MIN_TILE = 128
MAX_TILE = 512
MARGIN = 12


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


def on_white(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB, with a white background where it is transparent."""
    if picture.mode.startswith("I"):
        picture = eight_bit(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def decode_picture(content: bytes, origin: str) -> Image.Image:
    """Decode the bytes of a picture file as `read_picture`; errors name it as `origin`.

    Raises:
        ValueError: empty, too large, damaged or unknown content.
    """
    if not content:
        raise ValueError(f"{origin!r} is an empty file; copy or download the picture again")
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(
            f"{origin!r} is larger than {MAX_FILE_BYTES // 10**6} MB; save it smaller, e.g. as JPEG"
        )
    # Pillow warns of oddities in files (EXIF, palettes); a picture either decodes or is refused.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(content), formats=READABLE_FORMATS)
        except UnidentifiedImageError as error:
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
        try:
            # A phone's JPEG may hold previews as further frames (MPO); that is no animation.
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                logger.warning("%r is animated; its first frame is used", origin)
                picture.seek(0)
            picture.load()
            return on_white(upright(picture, origin))
        except Exception as error:  # damaged pixels raise nearly anything, too
            raise ValueError(
                f"{origin!r} is damaged or cut short; copy or download the picture again"
            ) from error


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as people see it: upright, 8-bit RGB, transparency on white.

    Of an animation the first frame is taken, with a warning in the log. Colour profiles are not
    applied. File size and picture size are checked before any pixel is decoded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, an empty, too large, damaged or unknown file.
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

    Raises:
        ValueError: not RGB.
    """
    check_rgb(picture)
    square = center_square(picture).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def tensor_to_pictures(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Return RGB pictures of images in [-1, 1]; values outside are clamped.

    Raises:
        ValueError: an image holds NaN or infinity.
    """
    images = images.detach().float().cpu()
    if not images.isfinite().all():
        raise ValueError(
            "expected images in [-1, 1], found NaN or infinity; the weights or latents are broken"
        )
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).numpy()]


def write_picture(picture: Image.Image, path: str | Path) -> None:
    """Write PNG, JPEG or WEBP by the suffix of `path`, whole or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it cannot be written.
        ValueError: another suffix.
    """
    path = Path(path)
    format_name = WRITABLE_FORMATS.get(path.suffix.lower())
    if format_name is None:
        raise ValueError(
            f"expected a file name ending in {', '.join(WRITABLE_FORMATS)}, found {str(path)!r}"
        )
    with whole_file(path) as temporary:
        picture.save(temporary, format=format_name, quality=95)


def labelled_grid(
    target: Image.Image | None,
    rows: Mapping[str, Sequence[Image.Image]],
    target_label: str = "target",
) -> Image.Image:
    """Return one picture with the target on the left and a labelled row for each entry.

    `labelled_grid(target, {"sources": sources, "results, strength 1.2": results})`. Every picture
    is cut to its middle square and has the size of the largest, within 128 to 512 px. None: no
    target.

    Raises:
        ValueError: no picture in the rows.
    """
    pictures = [picture for row in rows.values() for picture in row]
    if not pictures:
        raise ValueError(f"expected at least one picture in the rows, found none in {list(rows)}")
    side = max(min(picture.size) for picture in [*pictures, *([target] if target else [])])
    tile = min(max(side, MIN_TILE), MAX_TILE)
    font = ImageFont.load_default(size=max(16, tile // 12))
    labels = {row: " ".join(row.split()) for row in rows}
    target_label = " ".join(target_label.split())
    label_height = sum(font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (11, 2))

    # Long labels widen their column and are not cut.
    left = MARGIN
    if target is not None:
        left += MARGIN + max(tile, int(font.getlength(target_label)) + 1)
    longest = max(int(font.getlength(label)) + 1 for label in labels.values())
    columns = max(len(row) for row in rows.values())
    width = left + max(columns * (tile + MARGIN), longest + MARGIN)
    row_height = MARGIN + label_height + tile
    canvas = Image.new("RGB", (width, len(rows) * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)

    def place(picture: Image.Image, x: int, y: int) -> None:
        square = center_square(picture).resize((tile, tile), Image.Resampling.LANCZOS)
        canvas.paste(square, (x, y + label_height))

    if target is not None:
        draw.text((MARGIN, MARGIN), target_label, fill="black", font=font)
        place(target, MARGIN, MARGIN)
    for row, (label, row_pictures) in enumerate(rows.items()):
        y = MARGIN + row * row_height
        draw.text((left, y), labels[label], fill="black", font=font)
        for column, picture in enumerate(row_pictures):
            place(picture, left + column * (tile + MARGIN), y)
    return canvas
