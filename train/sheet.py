"""A sheet of images to look at while something trains."""

from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def save_sheet(
    images: Float[Tensor, "batch 3 height width"], path: Path, columns: int, scale: int = 2
) -> None:
    """Write images in [-1, 1] as one PNG, row by row, each pixel `scale` times as large."""
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    pixels = ((images.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i, picture in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)
