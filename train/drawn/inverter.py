"""Train the inverter of the bundled world: pictures back to W+ latents of its generator.

Learns from the generator's own samples, whose latents are known, and from drawn faces, whose
renderings must look like them.

    python -m train.drawn.inverter --generator G --out runs/inverter
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.drawn.inverter")

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.drawn.faces import psnr, sample_z, to_images, ws_from_z
from targetclip import command
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter
from targetclip.generators import load_generator
from train.drawn.generator import HELD_OUT_SEED, face_bank, save_pairs
from train.loop import Schedule, plain_settings, train


@dataclass(frozen=True)
class Config:
    generator: Path
    out: Path
    """Folder for checkpoint, log, pictures and inverter.safetensors."""
    faces: int = 150_000
    """Size of the bank of drawn faces (that of the generator is used again)."""
    steps: int = 6000
    batch_size: int = 32
    """Half of it samples of the generator, half drawn faces."""
    learning_rate: float = 1e-3
    latent_weight: float = 0.05
    """Of the squared error of the latent, beside that of the picture."""
    seed: int = 0
    evaluate_every: int = 500


def run(config: Config) -> None:
    command.make_folder(config.out)
    torch.manual_seed(config.seed)
    generator = load_generator(config.generator)
    inverter = Inverter(
        InverterConfig(
            resolution=generator.resolution,
            num_ws=generator.num_ws,
            w_dim=generator.w_dim,
            generator=generator.fingerprint,
        )
    )
    inverter.mean_w.copy_(generator.mean_w)
    banks = config.out.parent
    _, pictures = face_bank(banks, config.faces, config.seed, generator.w_dim)
    _, held_pictures = face_bank(banks, 512, HELD_OUT_SEED, generator.w_dim)
    held = to_images(held_pictures[:])
    half = config.batch_size // 2

    def loss_at(step: int) -> Tensor:
        seed = config.seed * 1_000_000_007 + step
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            ws = ws_from_z(generator, sample_z(half, generator.z_dim, seed))
            samples = generator.synthesis(ws).clamp(-1, 1)
        chosen = torch.randint(len(pictures), (half,), generator=random)
        truth = torch.cat([samples, to_images(pictures[chosen.numpy()])])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = inverter(truth).float()
            images = generator.synthesis(found)
        error = images - truth
        picture = (error.square() + 0.3 * error.abs()).mean()
        loss: Tensor = picture + config.latent_weight * (found[:half] - ws).square().mean()
        return loss

    def evaluate(average: Inverter) -> dict[str, float]:
        average.eval()
        with torch.no_grad():
            images = torch.cat([generator.synthesis(average(part)) for part in held.split(64)])
        save_pairs(held[:32], images[:32], config.out / "grid.png")
        return {"psnr": psnr(images, held)}

    schedule = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        ema=0.998,
        evaluate_every=config.evaluate_every,
    )
    settings = plain_settings(config, generator=generator.fingerprint)
    average = train(inverter, loss_at, config.out, schedule, evaluate, settings)
    save_inverter(average, config.out / "inverter.safetensors")
    then = "name it as inverter in a world's .toml file"
    command.say_next(config.out, "inverter.safetensors, grid.png, log.jsonl", then)


def main() -> None:
    """Run the command line."""
    command.main(run, Config, __doc__, "python -m train.drawn.inverter")
