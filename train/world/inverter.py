"""Train the inverter of the bundled world: pictures back to W+ latents of its generator.

The code of every drawn avatar is known, so it first learns these alone, without the generator; then
the pictures it is rendered back to must look like what it saw as well.

    python -m train.world.inverter --generator runs/avatars/generator/generator.safetensors \
        --out runs/avatars/inverter
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from train.world.settings import SeeingTraining


@dataclass(frozen=True, kw_only=True)
class Config(SeeingTraining):
    out: Path
    """Folder for a folder of each stage, and inverter.safetensors."""
    code_steps: int = 4000
    """Steps on codes alone."""
    steps: int = 1500
    """Steps on codes and on what they are rendered to."""
    noise: float = 0.05
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.world.inverter", Config)

import torch
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.codes import strongest
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter
from train.loop import train_by
from train.world import reader
from train.world.generator import exact_ws, psnr, random_at, rendered, save_pairs


def run(config: Config) -> None:
    sight = reader.Sight(config)
    generator, faces, known = sight.generator, sight.faces, sight.known
    device, layers, held = faces.z.device, generator.num_ws, known.images()
    sizes = InverterConfig(
        resolution=generator.resolution,
        num_ws=layers,
        w_dim=generator.w_dim,
        generator=generator.fingerprint,
        channels=(32, 64, 96, 128, 128),
    )
    inverter = Inverter(sizes).to(device)
    inverter.mean_w.copy_(generator.mean_w)

    def loss_on(pictures: bool, step: int) -> Tensor:
        random = random_at(config.seed + 1, step, device)
        count = config.batch_size // 3 if pictures else config.batch_size
        images, chosen = sight.batch(count, random)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = inverter(images).float()
            codes = F.mse_loss(found, exact_ws(faces.indices[chosen], layers))
            if not pictures:
                return codes
            error = generator.synthesis(found) - images
        return codes + (error.square() + 0.3 * error.abs()).mean()

    def evaluate(average: Inverter) -> dict[str, float]:
        ws = torch.cat([average(part) for part in held.split(64)])
        images = rendered(generator, ws)
        save_pairs(held[:32], images[:32], config.out / "grid.png")
        right = strongest(ws.mean(dim=1)) == known.indices
        return {"psnr": psnr(images, held), "right": float(right.float().mean())}

    def train(stage: str, pictures: bool, **schedule: Any) -> None:
        losses, out = partial(loss_on, pictures), config.out / stage
        average = train_by(config, inverter, losses, evaluate, out=out, ema=0.998, **schedule)
        inverter.load_state_dict(average.state_dict())

    train("codes", False, steps=config.code_steps, decay_from=0.6)
    train("pictures", True, learning_rate=config.learning_rate / 2, decay_from=0.3)
    save_inverter(inverter.cpu(), config.out / "inverter.safetensors")
    command.say_next(config.out, "inverter.safetensors, grid.png", "name it in the world's file")
