"""What judges see in pictures, kept on disk by the pictures' content: none is looked at twice.

Knows pictures, models with `embed_images` and a `fingerprint`, and files; nothing of scores.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.targets import digest_of, picture_id
from targetclip import command
from targetclip.media.images import picture_to_tensor
from targetclip.weights import read_tensors, save_tensors

FORMAT = "targetclip-embeddings/1"
AT_ONCE, PIXELS = 64, 2**22  # pictures that judges see at once, and their pixels


class Embeddings:
    """What judges see in pictures, kept in a folder by the pictures' content, as it is made.

    Args:
        judges: models with `embed_images` and a `fingerprint`, by their names.
    """

    def __init__(self, folder: Path, judges: Mapping[str, Any], device: torch.device) -> None:
        self.folder, self.judges, self.device = folder, judges, device
        self.rows: dict[str, Tensor] = {}
        self.waiting: dict[int, dict[str, Tensor]] = defaultdict(dict)
        """Images to be judged, by side and id."""
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.safetensors"):
            try:
                self.rows |= read_tensors(path, "embeddings", [FORMAT], "delete it")[1]
            except ValueError as error:
                command.say(f"embeddings made again: {command.one_line(error)}", error=True)

    def key(self, judge: str, name: str) -> str:
        return f"{self.judges[judge].fingerprint} {name}"

    def add(self, picture: Image.Image) -> str:
        """Take a picture; return its id."""
        name, side = picture_id(picture), min(picture.size)
        waiting = self.waiting[side]
        if any(self.key(judge, name) not in self.rows for judge in self.judges):
            waiting[name] = picture_to_tensor(picture, side)[0]
        if len(waiting) >= min(AT_ONCE, PIXELS // side**2):
            self.judge(side)
        return name

    @torch.no_grad()
    def judge(self, side: int) -> None:
        """Judge the pictures of a size that wait, and keep what is seen."""
        images = self.waiting.pop(side, {})
        made: dict[str, Tensor] = {}
        for judge, model in self.judges.items():
            names = [name for name in images if self.key(judge, name) not in self.rows]
            if names:
                batch = torch.stack([images[name] for name in names]).to(self.device)
                seen = model.embed_images(batch).float().cpu()
                made |= {self.key(judge, n): row for n, row in zip(names, seen, strict=True)}
        if made:
            path = self.folder / f"{digest_of(*made)[:16]}.safetensors"
            save_tensors(path, made, {"format": FORMAT})
            self.rows |= made

    def finish(self) -> None:
        """Judge all that still waits."""
        for side in list(self.waiting):
            self.judge(side)

    def of(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the embeddings of pictures, [pictures, features], by the names of judges."""
        return {
            judge: torch.stack([self.rows[self.key(judge, name)] for name in names])
            for judge in self.judges
        }
