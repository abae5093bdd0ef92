"""Train the inverter of the bundled world: pictures back to W+ latents of its generator.

The code of every drawn avatar is known, so it first learns these alone, without the generator; then
the pictures it is rendered back to must look like what it saw as well.

    python -m train.world.inverter --generator runs/avatars/generator/generator.safetensors \
        --out runs/avatars/inverter
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.world.inverter")

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.illustrated.codes import strongest
from targetclip import command
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter
from targetclip.tracking import Tracker, check_tracker
from train.loop import Schedule, plain_settings, train
from train.world.generator import (
    HELD_OUT_SEED,
    Faces,
    best_device,
    load_bundled,
    psnr,
    random_at,
    save_pairs,
)
from train.world.reader import Sight


@dataclass(frozen=True)
class Config:
    generator: Path
    out: Path
    """Folder for a folder of each stage, and inverter.safetensors."""
    faces: int = 40_000
    """Size of the bank of pictures (that of the generator is used again)."""
    code_steps: int = 4000
    """Steps on codes alone."""
    steps: int = 1500
    """Steps on codes and on what they are rendered to."""
    batch_size: int = 96
    """A third of it generated, a half of these from blended codes."""
    learning_rate: float = 1e-3
    noise: float = 0.05
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    seed: int = 0
    evaluate_every: int = 1000
    tracker: Tracker | None = None
    """Send the figures of the log to this tracker as well: tensorboard (files in the folder of each
    stage) or wandb. It needs the package of that name."""


def run(config: Config) -> None:
    check_tracker(config.tracker)
    torch.manual_seed(config.seed)
    device = best_device()
    generator = load_bundled(config.generator, device)
    layers = generator.num_ws
    sizes = InverterConfig(
        resolution=generator.resolution,
        num_ws=layers,
        w_dim=generator.w_dim,
        generator=generator.fingerprint,
        channels=(32, 64, 96, 128, 128),
    )
    inverter = Inverter(sizes).to(device)
    inverter.mean_w.copy_(generator.mean_w)
    faces = Faces(config.out.parent, config.faces, config.seed, device)
    known = Faces(config.out.parent, min(512, config.faces), HELD_OUT_SEED, device)
    sight = Sight(generator, faces, config.noise)
    held = known.images(torch.arange(len(known.z), device=device))

    def loss_on(pictures: bool, step: int) -> Tensor:
        random = random_at(config.seed + 1, step, device)
        count = config.batch_size // 3 if pictures else config.batch_size
        images, chosen = sight.batch(count, random)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = inverter(images).float()
            codes: Tensor = (found - faces.exact(chosen, layers)).square().mean()
            if not pictures:
                return codes
            error = generator.synthesis(found) - images
        loss: Tensor = codes + (error.square() + 0.3 * error.abs()).mean()
        return loss

    @torch.no_grad()
    def evaluate(average: Inverter) -> dict[str, float]:
        average.eval()
        ws = torch.cat([average(part) for part in held.split(64)])
        images = torch.cat([generator.synthesis(part) for part in ws.split(64)])
        save_pairs(held[:32], images[:32], config.out / "grid.png")
        right = strongest(ws.mean(dim=1)) == known.indices
        return {"psnr": psnr(images, held), "right": float(right.float().mean())}

    first = Schedule(
        steps=config.code_steps,
        learning_rate=config.learning_rate,
        decay_from=0.6,
        ema=0.998,
        evaluate_every=config.evaluate_every,
    )
    settings, losses = plain_settings(config), partial(loss_on, False)
    tracker = config.tracker
    average = train(
        inverter, losses, config.out / "codes", first, evaluate, settings, tracker=tracker
    )
    inverter.load_state_dict(average.state_dict())
    last = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate / 2,
        decay_from=0.3,
        ema=0.998,
        evaluate_every=config.evaluate_every,
    )
    losses = partial(loss_on, True)
    average = train(
        inverter, losses, config.out / "pictures", last, evaluate, settings, tracker=tracker
    )
    save_inverter(average.cpu(), config.out / "inverter.safetensors")
    command.say_next(config.out, "inverter.safetensors, grid.png", "name it in the world's file")


def main() -> None:
    command.main(run, Config, __doc__, "python -m train.world.inverter")
