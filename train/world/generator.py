"""Train the generator of the bundled world: latents to avatars, by plain regression.

Codes say exactly what a picture shows, and the mapping network is made, not learned
(`data.illustrated.codes`). The synthesis learns first from exact codes, then from blends of codes
as well, where the stronger value is what shows, and from what the mapping gives.

    python -m train.world.generator --out runs/avatars/generator     # minutes on a GPU; resumes
    python -m train.world.generator --out runs/try --faces 500 --exact-steps 50 --steps 50   # a try
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.world.generator")

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.avatars import to_images
from data.illustrated.codes import (
    SIZE,
    VALUES,
    W_DIM,
    blend,
    codes,
    face_bank,
    indices_from_z,
    one_hot,
    set_mapping,
)
from targetclip import command
from targetclip.generators import load_generator
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.media.images import labelled_grid, tensor_to_pictures
from targetclip.tracking import Tracker, check_tracker
from train.loop import Schedule, plain_settings, train

HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for a folder of each stage (checkpoint, log, pictures) and generator.safetensors."""
    start: Path | None = None
    """A generator of these sizes to train further, instead of starting on exact codes."""
    faces: int = 40_000
    """Pictures rendered once, beside `out`, and kept to train on."""
    exact_steps: int = 3000
    """Steps on exact codes."""
    steps: int = 9000
    """Steps on codes of which a half are blends, a quarter exact, and a quarter come from z."""
    batch_size: int = 64
    exact_learning_rate: float = 3e-3
    learning_rate: float = 2e-3
    seed: int = 0
    evaluate_every: int = 1000
    tracker: Tracker | None = None
    """Send the figures of the log to this tracker as well: tensorboard (files in the folder of each
    stage) or wandb. It needs the package of that name."""
    channels: tuple[int, ...] = (128, 128, 96, 64, 48, 24)
    """Widths at 4, 8, ... 128 px."""


def best_device() -> torch.device:
    """Return the accelerator if there is one, else the processor."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found or torch.get_default_device()


def psnr(
    images: Float[Tensor, "batch 3 height width"], truth: Float[Tensor, "batch 3 height width"]
) -> float:
    """Return the peak signal-to-noise ratio in dB, mean over pictures, for images in [-1, 1]."""
    error = (images.clamp(-1, 1) - truth).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def save_pairs(
    truth: Float[Tensor, "batch 3 height width"],
    images: Float[Tensor, "batch 3 height width"],
    path: Path,
) -> None:
    """Write a picture to look at while something trains: rows of what was wanted and found."""
    rows: dict[str, list[Image.Image]] = {}
    for start in range(0, len(truth), 8):
        rows[f"wanted {start}"] = tensor_to_pictures(truth[start : start + 8])
        rows[f"found {start}"] = tensor_to_pictures(images[start : start + 8])
    labelled_grid(None, rows).save(path)


def importance(size: int) -> Float[Tensor, "1 1 size size"]:
    """Return the weight of each pixel in the loss: a face counts double; 1 on average."""
    weight = torch.ones(1, 1, size, size)
    weight[:, :, size * 9 // 32 : size * 23 // 32, size * 9 // 32 : size * 23 // 32] = 2.0
    return weight / weight.mean()


def random_at(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the random numbers of one step of a training, on its device."""
    return torch.Generator(device).manual_seed(seed * 1_000_000_007 + step)


def load_bundled(path: Path, device: torch.device) -> StyleGAN2:
    """Read a generator of avatars onto a device. ValueError: its latents or images are not those of
    `data.illustrated.codes`, as those of every other generator."""
    generator = load_generator(path)
    if (generator.w_dim, generator.resolution) != (W_DIM, SIZE):
        raise ValueError(
            f"--generator: expected one made by train.world.generator, with w of {W_DIM} numbers "
            f"and images of {SIZE} px, found {generator.w_dim} and {generator.resolution}; these "
            "trainers know the bundled world's faces alone"
        )
    return generator.to(device)


class Faces:
    """Training pictures, and codes to ask a generator for them with, on one device."""

    def __init__(self, folder: Path, count: int, seed: int, device: torch.device) -> None:
        z, pictures = face_bank(folder, count, seed)
        self.z, self.pictures = z.to(device), pictures.to(device)
        self.indices: Int[Tensor, "count attributes"] = indices_from_z(self.z)

    def images(
        self, chosen: Int[Tensor, " batch"], size: int = SIZE
    ) -> Float[Tensor, "batch 3 size size"]:
        """Return pictures as images in [-1, 1], shrunk to `size` px."""
        return F.avg_pool2d(to_images(self.pictures[chosen]), SIZE // size)

    def exact(self, chosen: Int[Tensor, " batch"], layers: int) -> Float[Tensor, "batch layers w"]:
        """Return the exact codes of faces, the same for all layers."""
        return codes(one_hot(self.indices[chosen]))[:, None].expand(-1, layers, -1)

    def blended(
        self, chosen: Int[Tensor, " batch"], layers: int, random: torch.Generator
    ) -> Float[Tensor, "batch layers w"]:
        """Return codes of faces with values of other faces mixed in, which do not show."""
        other = self.indices[pick(len(self.z), len(chosen), random)]
        return codes(blend(self.indices[chosen], other, random, layers))


def pick(limit: int, count: int, random: torch.Generator) -> Int[Tensor, " count"]:
    """Draw numbers from 0 to `limit` - 1."""
    return torch.randint(limit, (count,), generator=random, device=random.device)


Latents = Callable[[StyleGAN2, Int[Tensor, " batch"], torch.Generator], Tensor]


def exact_latents(faces: Faces) -> Latents:
    """Return latents that are exact codes."""
    return lambda network, chosen, random: faces.exact(chosen, network.num_ws)


def mixed_latents(faces: Faces) -> Latents:
    """Return latents of which a half are blended, a quarter exact, and a quarter come from z."""

    def latents(
        network: StyleGAN2, chosen: Int[Tensor, " batch"], random: torch.Generator
    ) -> Float[Tensor, "batch layers w"]:
        exact, mapped, *blended = chosen.tensor_split(4)
        parts = (
            faces.exact(exact, network.num_ws),
            network.mapping(faces.z[mapped]),
            faces.blended(torch.cat(blended), network.num_ws, random),
        )
        return torch.cat(parts)

    return latents


def train_pictures(
    config: Config,
    network: StyleGAN2,
    faces: Faces,
    held: Faces,
    latents: Latents,
    schedule: Schedule,
    out: Path,
) -> StyleGAN2:
    """Train the synthesis on pictures at its resolution; return the averaged network."""
    size, device = network.resolution, network.const.device
    weight = importance(size).to(device)
    everyone = torch.arange(len(held.z), device=device)
    truth = held.images(everyone, size)

    def loss_at(step: int) -> Tensor:
        random = random_at(config.seed, step, device)
        chosen = pick(len(faces.z), config.batch_size, random)
        wanted = faces.images(chosen, size)
        ws = latents(network, chosen, random)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            error = network.synthesis(ws) - wanted
        return (weight * (error.square() + 0.3 * error.abs())).mean()

    @torch.no_grad()
    def evaluate(average: StyleGAN2) -> dict[str, float]:
        layers = average.num_ws
        kinds = {
            "exact": held.exact(everyone, layers),
            "blended": held.blended(everyone, layers, random_at(config.seed, 0, device)),
            "mapped": average.mapping(held.z),
        }
        figures = {}
        for name, ws in kinds.items():
            images = torch.cat([average.synthesis(w) for w in ws.split(64)])
            figures[f"psnr_{name}"] = psnr(images, truth)
            save_pairs(truth[:32], images[:32], out / f"{name}.png")
        return figures

    settings = plain_settings(config, stage=out.name)
    return train(network, loss_at, out, schedule, evaluate, settings, tracker=config.tracker)


def new_network(sizes: StyleGAN2Config) -> StyleGAN2:
    """Return an untrained network with the mapping of the codes, which is not to be trained.

    What no code has is without effect: its weights would stay as they were drawn.
    """
    network = StyleGAN2(sizes)
    set_mapping(network.mapping_network)
    with torch.no_grad():
        for layer in (*network.convs, *network.to_rgbs):
            layer.affine.weight[:, VALUES:] = 0
    return network


def run(config: Config) -> None:
    check_tracker(config.tracker)
    torch.manual_seed(config.seed)
    device = best_device()
    faces = Faces(config.out.parent, config.faces, config.seed, device)
    held = Faces(config.out.parent, min(512, config.faces), HELD_OUT_SEED, device)
    sizes = StyleGAN2Config(
        resolution=SIZE, w_dim=W_DIM, z_dim=W_DIM, mapping_layers=2, channels=config.channels
    )
    network = new_network(sizes)
    if config.start is not None:
        network = load_generator(config.start).requires_grad_(True)
        if network.config != sizes:
            raise ValueError(f"--start {config.start}: expected {sizes}, found {network.config}")
    network.mapping_network.requires_grad_(False)
    network = network.to(device)
    for name, latents, steps, rate, decay_from in (
        ("exact", exact_latents(faces), config.exact_steps, config.exact_learning_rate, 0.9),
        ("blends", mixed_latents(faces), config.steps, config.learning_rate, 0.3),
    ):
        if name == "exact" and config.start is not None:
            continue
        schedule = Schedule(
            steps=steps,
            learning_rate=rate,
            decay_from=decay_from,
            evaluate_every=config.evaluate_every,
        )
        network = train_pictures(
            config, network, faces, held, latents, schedule, config.out / name
        ).requires_grad_(True)
        network.mapping_network.requires_grad_(False)
    with command.whole_file(config.out / "generator.safetensors") as temporary:
        save_safetensors(network, temporary)  # the mapping is finer than half precision
    command.say_next(config.out, "generator.safetensors", "train its inverter and reader")


def main() -> None:
    command.main(run, Config, __doc__, "python -m train.world.generator")
