"""Pictures in and out: reading what people have on disk, writing, laying results side by side.

Knows the one image convention of the project: in memory NCHW float in [-1, 1], on disk HWC uint8,
always RGB. Knows nothing of generators, embedders or directions.
"""

import io
import logging
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger(__name__)

# TIFF is left out on purpose: its many compressions are the least trodden decoders of Pillow.
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
WRITABLE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_FILE_BYTES = 50_000_000
MAX_SIDE = 8192

MIN_TILE = 128
MAX_TILE = 512
MARGIN = 12


def read_file(path: Path) -> bytes:
    """The bytes of a file that may be a picture, one more than allowed if it is too large."""
    if path.is_dir():
        raise ValueError(
            f"expected a picture, found a folder: {str(path)!r}; give the path of one file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {str(path)!r}; check the path")
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def eight_bit(picture: Image.Image) -> Image.Image:
    """Rescale 16-bit grey (modes I;16 and I) to 8 bits; Pillow alone would clip at 255."""
    values = np.asarray(picture).astype(np.float64) / 257.0  # 65535 / 255
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def upright(picture: Image.Image, origin: str) -> Image.Image:
    """Turn the picture as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # a broken EXIF block raises nearly anything
        logger.warning("%r: orientation not readable (%s), kept as stored", origin, error)
        return picture


def on_white(picture: Image.Image) -> Image.Image:
    """RGB, with whatever is transparent showing a white background."""
    if picture.mode.startswith("I"):
        picture = eight_bit(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def decode_picture(content: bytes, origin: str) -> Image.Image:
    """Decode the bytes of a picture file as `read_picture` does; errors name it as `origin`.

    Raises:
        ValueError: empty, too large, damaged or unknown content.
    """
    if not content:
        raise ValueError(f"{origin!r} is an empty file; copy or download the picture again")
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(
            f"{origin!r} is larger than {MAX_FILE_BYTES // 10**6} MB; save it smaller, e.g. as JPEG"
        )
    # Pillow warns of oddities in files (EXIF, palettes); the picture either decodes or is refused.
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
            # A phone's JPEG may carry previews as further frames (MPO): that is no animation.
            if picture.format != "MPO" and getattr(picture, "is_animated", False):
                logger.warning("%r is animated; its first frame is used", origin)
                picture.seek(0)
            picture.load()
            return on_white(upright(picture, origin))
        except Exception as error:  # so do damaged pixels
            raise ValueError(
                f"{origin!r} is damaged or cut short; copy or download the picture again"
            ) from error


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as a person would see it: upright, 8-bit RGB, transparency on white.

    Of an animation the first frame is taken, with a warning in the log. Colour profiles are not
    applied. File size and picture size are checked before any pixel is decoded.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, an empty, too large, damaged or unknown file.
    """
    path = Path(path)
    return decode_picture(read_file(path), str(path))


def center_square(picture: Image.Image) -> Image.Image:
    """The largest square around the middle of the picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def picture_to_tensor(picture: Image.Image, size: int) -> Float[Tensor, "1 3 {size} {size}"]:
    """The middle square of an RGB picture, resized with antialiasing, in [-1, 1]."""
    if picture.mode != "RGB":
        raise ValueError(f"expected an RGB picture, found mode {picture.mode!r}; use read_picture")
    square = center_square(picture).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    return pixels.float() / 127.5 - 1


def tensor_to_pictures(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """RGB pictures of images in [-1, 1]; values outside are clamped, as a screen would.

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
    """Write PNG, JPEG or WEBP by the suffix of `path`; a reader never sees half a file.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: another suffix.
    """
    path = Path(path)
    format_name = WRITABLE_FORMATS.get(path.suffix.lower())
    if format_name is None:
        raise ValueError(
            f"expected a file name ending in {', '.join(WRITABLE_FORMATS)}, found {str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write into; create it first")
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        picture.save(temporary, format=format_name, quality=95)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def labelled_grid(
    target: Image.Image | None,
    rows: Mapping[str, Sequence[Image.Image]],
    target_label: str = "target",
) -> Image.Image:
    """One picture to look at: the target on the left, a labelled row of pictures for each entry.

    `labelled_grid(target, {"sources": sources, "results, strength 1.2": results})`. Every picture
    is cut to its middle square and shown at one size: the largest one's, within 128 to 512 px.
    Without a target the rows stand alone.
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

    # Long labels widen their column rather than being cut.
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
    for row, (label, shown) in enumerate(rows.items()):
        y = MARGIN + row * row_height
        draw.text((left, y), labels[label], fill="black", font=font)
        for column, picture in enumerate(shown):
            place(picture, left + column * (tile + MARGIN), y)
    return canvas
