"""Train the inverter of the bundled world: pictures back to W+ latents of its generator.

The code of every drawn avatar is known, so it first learns these alone, without the generator; then
the pictures it is rendered back to must look like what it saw as well.

    python -m train.world.inverter --generator runs/avatars/generator/generator.safetensors \
        --out runs/avatars/inverter
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from targetclip.generators import load_generator
from targetclip.inverter import Inverter, InverterConfig, save_inverter
from train.loop import Schedule, train, write_atomically
from train.world.generator import HELD_OUT_SEED, Faces, best_device, psnr, save_pairs
from train.world.reader import Sight


@dataclass(frozen=True)
class Config:
    generator: Path
    out: Path
    """Folder for a folder of each stage, and inverter.safetensors."""
    faces: int = 40_000
    """Size of the bank of pictures (that of the generator is used again)."""
    code_steps: int = 3000
    """Steps on codes alone."""
    steps: int = 1000
    """Steps on codes and on what they are rendered to."""
    batch_size: int = 48
    """A third of it generated, a half of these from blended codes."""
    learning_rate: float = 1e-3
    noise: float = 0.05
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    seed: int = 0
    evaluate_every: int = 500


def run(config: Config) -> None:
    torch.manual_seed(config.seed)
    device = best_device()
    generator = load_generator(config.generator).to(device)
    layers = generator.num_ws
    sizes = InverterConfig(
        generator.resolution, layers, generator.w_dim, generator.fingerprint,
        (32, 64, 96, 128, 128),
    )  # fmt: skip
    inverter = Inverter(sizes).to(device)
    inverter.mean_w.copy_(generator.mean_w)
    sight = Sight(generator, Faces(config.out.parent, config.faces, config.seed), config.noise)
    known = Faces(config.out.parent, min(512, config.faces), HELD_OUT_SEED)
    held = known.images(torch.arange(len(known.z)))

    def loss_on(pictures: bool, step: int) -> Tensor:
        random = torch.Generator().manual_seed(config.seed * 1_000_000_007 + step + 1)
        count = config.batch_size // 3 if pictures else config.batch_size
        images, chosen = sight.batch(count, random)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = inverter(images).float()
            codes: Tensor = (found - sight.faces.exact(chosen, layers).to(device)).square().mean()
            if not pictures:
                return codes
            error = generator.synthesis(found) - images
        loss: Tensor = codes + (error.square() + 0.3 * error.abs()).mean()
        return loss

    @torch.no_grad()
    def evaluate(average: Inverter) -> dict[str, float]:
        average.eval()
        ws = torch.cat([average(part.to(device)) for part in held.split(64)])
        images = torch.cat([generator.synthesis(part) for part in ws.split(64)]).cpu()
        save_pairs(held[:32], images[:32], config.out / "grid.png")
        right = known.book.strongest(ws.mean(dim=1).cpu()) == known.indices
        return {"psnr": psnr(images, held), "right": float(right.float().mean())}

    first = Schedule(
        config.code_steps, config.learning_rate, 0.6, 0.998, evaluate_every=config.evaluate_every
    )
    average = train(
        inverter, lambda step: loss_on(False, step), config.out / "codes", first, evaluate
    )
    inverter.load_state_dict(average.state_dict())
    last = Schedule(
        config.steps, config.learning_rate / 2, 0.3, 0.998, evaluate_every=config.evaluate_every
    )
    average = train(
        inverter, lambda step: loss_on(True, step), config.out / "pictures", last, evaluate
    )
    write_atomically(
        config.out / "inverter.safetensors", lambda path: save_inverter(average.cpu(), path)
    )


def main() -> None:
    run(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
