"""Train the attribute reader of the bundled world, on avatars drawn and generated.

Both have known attributes: a picture is drawn from them, and a code stands for them. Nothing else
is ever trained through the reader.

    python -m train.world.reader --generator runs/avatars/generator/generator.safetensors \
        --out runs/avatars/reader
"""

from dataclasses import dataclass
from pathlib import Path

from targetclip import command
from targetclip.command import start
from train.world.settings import SeeingTraining


@dataclass(frozen=True, kw_only=True)
class Config(SeeingTraining):
    out: Path
    """Folder for checkpoint, log and reader.safetensors."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.world.reader", Config)

import torch
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.codes import COUNTS, Indices, one_hot, visible
from eval.reader import NAMES, PRESENT, SPANS, AvatarReader, save_reader, with_presence
from train.loop import train_by
from train.world import generator
from train.world.generator import Chosen, Faces, Images, exact_ws, pick, random_at, rendered


class Sight:
    """Pictures to learn to read: drawn ones, and what a generator makes of the same faces."""

    def __init__(self, config: SeeingTraining) -> None:
        device, self.noise = generator.begin(config), config.noise
        self.generator = generator.load_bundled(config.generator, device)
        self.faces, self.known = Faces.banks(config, device)

    def batch(self, count: int, random: torch.Generator) -> tuple[Images, Chosen]:
        """Return pictures with a little noise, and which faces of the bank they show."""
        chosen = pick(len(self.faces.z), count, random)
        made = self.generated(chosen[: count // 3], random)
        images = torch.cat([made, self.faces.images(chosen[count // 3 :])])
        deviation = torch.rand((count, 1, 1, 1), generator=random, device=random.device)
        grain = torch.randn(images.shape, generator=random, device=random.device)
        return images + self.noise * deviation * grain, chosen

    @torch.no_grad()
    def generated(self, chosen: Chosen, random: torch.Generator) -> Images:
        """Return the generator's pictures of faces, every second part from blended codes."""
        exact, blended = chosen.tensor_split(2)
        layers = self.generator.num_ws
        mixed = self.faces.blended(blended, layers, random)
        ws = torch.cat([exact_ws(self.faces.indices[exact], layers), mixed])
        with torch.autocast(random.device.type, dtype=torch.bfloat16):
            return self.generator.synthesis(ws).float().clamp(-1, 1)

    @torch.no_grad()
    def exact(self, indices: Indices) -> Images:
        """Return the generator's pictures of exact codes."""
        return rendered(self.generator, exact_ws(indices, self.generator.num_ws)).clamp(-1, 1)


def agreements(found: Indices, truth: Indices) -> dict[str, float]:
    """Return how often a reader is right about each attribute, where the picture shows it, and
    about whether each kind of `PRESENT` is there at all."""
    right, seen = (found == truth).float(), visible(truth)
    figures = {name: float(right[seen[:, i], i].mean()) for i, name in enumerate(NAMES)}
    read, known = (with_presence(one_hot(indices)) for indices in (found, truth))
    same = (read == known).float()
    return figures | {f"{k}_there": float(same[:, SPANS[k].start].mean()) for k in PRESENT}


def run(config: Config) -> None:
    sight = Sight(config)
    faces, known = sight.faces, sight.known
    reader = AvatarReader().to(faces.z.device)
    held = {"drawn": known.images(), "generated": sight.exact(known.indices)}

    def loss_at(step: int) -> Tensor:
        random = random_at(config.seed, step, faces.z.device)
        images, chosen = sight.batch(config.batch_size, random)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits = reader(images).float()
        truth = one_hot(faces.indices[chosen])
        groups = zip(logits.split(COUNTS, 1), truth.split(COUNTS, 1), strict=True)
        return torch.stack([F.cross_entropy(found, wanted) for found, wanted in groups]).mean()

    def evaluate(average: AvatarReader) -> dict[str, float]:
        figures: dict[str, float] = {}
        for kind, images in held.items():
            found = torch.cat([average.values(part) for part in images.split(64)])
            read = agreements(found.cpu(), known.indices.cpu())
            figures |= {f"{kind}_{name}": value for name, value in read.items()}
        return figures

    average = train_by(config, reader, loss_at, evaluate, ema=0.998)
    save_reader(average, config.out / "reader.safetensors")
    command.say_next(config.out, "reader.safetensors", "give it to eval.reader.load_reader")
