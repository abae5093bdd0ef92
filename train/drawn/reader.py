"""Train the attribute reader of the bundled world, on drawn faces and on generated ones.

Both have known parameters: a drawn face is drawn from them, and a latent stands for them. Nothing
else is ever trained through the reader.

    python -m train.drawn.reader --generator runs/generator/generator.safetensors --out runs/reader
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.drawn.reader")

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.drawn.faces import faces_from_z, sample_z, to_images, ws_from_z
from data.drawn.readings import truth_of
from eval.reader import AttributeReader, agreement, mean_errors, save_reader
from targetclip import command
from targetclip.generators import load_generator
from train.drawn.generator import HELD_OUT_SEED, face_bank
from train.loop import Schedule, plain_settings, train


@dataclass(frozen=True)
class Config:
    generator: Path
    out: Path
    """Folder for checkpoint, log and reader.safetensors."""
    faces: int = 150_000
    """Size of the bank of drawn faces (that of the generator is used again)."""
    steps: int = 5000
    batch_size: int = 48
    """A third of it samples of the generator, the rest drawn faces."""
    learning_rate: float = 1e-3
    noise: float = 0.1
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    seed: int = 0
    evaluate_every: int = 500


def run(config: Config) -> None:
    command.make_folder(config.out)
    torch.manual_seed(config.seed)
    generator = load_generator(config.generator)
    reader = AttributeReader()
    banks = config.out.parent
    z, pictures = face_bank(banks, config.faces, config.seed, generator.w_dim)
    parameters = faces_from_z(z).numpy()
    held_z, held_pictures = face_bank(banks, 512, HELD_OUT_SEED, generator.w_dim)
    held_values, held_seen = map(torch.from_numpy, truth_of(faces_from_z(held_z).numpy()))
    with torch.no_grad():
        parts = [generator.synthesis(ws_from_z(generator, part)) for part in held_z.split(64)]
    held = {"drawn": to_images(held_pictures[:]), "generated": torch.cat(parts).clamp(-1, 1)}
    third = config.batch_size // 3

    def loss_at(step: int) -> Tensor:
        seed = config.seed * 1_000_000_007 + step
        random = torch.Generator().manual_seed(seed)
        fresh = sample_z(third, generator.z_dim, seed)
        chosen = torch.randint(len(z), (config.batch_size - third,), generator=random).numpy()
        with torch.no_grad():
            samples = generator.synthesis(ws_from_z(generator, fresh)).clamp(-1, 1)
        images = torch.cat([samples, to_images(pictures[chosen])])
        deviation = config.noise * torch.rand(len(images), 1, 1, 1, generator=random)
        images = images + deviation * torch.randn(images.shape, generator=random)
        faces = np.concatenate([faces_from_z(fresh).numpy(), parameters[chosen]])
        values, seen = map(torch.from_numpy, truth_of(faces))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = reader(images).float()
        error = found - values
        loss: Tensor = ((error.square() + 0.1 * error.abs()) * seen).sum() / seen.sum()
        return loss

    def evaluate(average: AttributeReader) -> dict[str, float]:
        average.eval()
        figures: dict[str, float] = {}
        for name, images in held.items():
            with torch.no_grad():
                found = average(images)
            errors = mean_errors(found, held_values, held_seen)
            figures |= {f"{name}_{key}_error": value for key, value in errors.items()}
            for item in ("glasses", "hat", "beard"):
                figures[f"{name}_{item}_agreement"] = agreement(found, held_values, item)
        return figures

    schedule = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        ema=0.998,
        evaluate_every=config.evaluate_every,
    )
    settings = plain_settings(config, generator=generator.fingerprint)
    average = train(reader, loss_at, config.out, schedule, evaluate, settings)
    save_reader(average, config.out / "reader.safetensors")
    then = "put it in place of eval/reader.safetensors"
    command.say_next(config.out, "reader.safetensors, log.jsonl", then)


def main() -> None:
    """Run the command line."""
    command.main(run, Config, __doc__, "python -m train.drawn.reader")
