"""Train the generator of the bundled world: latents to avatars, by plain regression.

Codes say exactly what a picture shows, and the mapping network is made, not learned
(`data.illustrated.codes`). The synthesis learns first from exact codes, then from blends of codes
as well, where the stronger value is what shows, and from what the mapping gives.

    python -m train.world.generator --out runs/avatars/generator     # minutes on a GPU; resumes
    python -m train.world.generator --out runs/try --faces 500 --exact-steps 50 --steps 50   # a try
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from train.world.settings import Training


@dataclass(frozen=True, kw_only=True)
class Config(Training):
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
    channels: tuple[int, ...] = (128, 128, 96, 64, 48, 24)
    """Widths at 4, 8, ... 128 px."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.world.generator", Config)

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.illustrated import codes
from data.illustrated.avatars import to_images
from data.illustrated.codes import SIZE, VALUES, W_DIM, Indices, indices_from_z
from targetclip.generators import load_generator
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.media.images import labelled_grid, tensor_to_pictures
from targetclip.tracking import check_tracker
from train.loop import train_by

HELD_OUT_SEED = 1_000_003
ALL = slice(None)
Chosen = Int[Tensor, " batch"]  # places in a bank of faces
Images = Float[Tensor, "batch 3 height width"]  # in [-1, 1]
Ws = Float[Tensor, "batch layers w_dim"]


def begin(config: Training) -> torch.device:
    """Seed what torch draws, and return the accelerator if there is one, else the processor.
    ValueError: the tracker's package is missing."""
    check_tracker(config.tracker)
    torch.manual_seed(config.seed)
    return command.choose_device()


def psnr(images: Images, truth: Images) -> float:
    """Return the peak signal-to-noise ratio in dB, mean over pictures, for images in [-1, 1]."""
    error = (images.clamp(-1, 1) - truth).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def save_pairs(truth: Images, images: Images, path: Path) -> None:
    """Write a picture to look at while something trains: rows of what was wanted and found."""
    rows = {
        f"{name} {start}": tensor_to_pictures(shown[start : start + 8])
        for start in range(0, len(truth), 8)
        for name, shown in (("wanted", truth), ("found", images))
    }
    labelled_grid(None, rows).save(path)


def importance(size: int) -> Float[Tensor, "1 1 size size"]:
    """Return the weight of each pixel in the loss: a face counts double; 1 on average."""
    weight, face = torch.ones(1, 1, size, size), slice(size * 9 // 32, size * 23 // 32)
    weight[:, :, face, face] = 2.0
    return weight / weight.mean()


def random_at(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the random numbers of one step of a training, on its device."""
    return torch.Generator(device).manual_seed(seed * 1_000_000_007 + step)


def load_bundled(path: Path, device: torch.device) -> StyleGAN2:
    """Read a generator of avatars. ValueError: its latents or images have other sizes."""
    generator = load_generator(path)
    if (generator.w_dim, generator.resolution) != (W_DIM, SIZE):
        raise ValueError(
            f"--generator: expected one made by train.world.generator, with w of {W_DIM} numbers "
            f"and images of {SIZE} px, found {generator.w_dim} and {generator.resolution}; these "
            "trainers know the bundled world's faces alone"
        )
    return generator.to(device)


def pick(limit: int, count: int, random: torch.Generator) -> Chosen:
    """Draw numbers from 0 to `limit` - 1."""
    return torch.randint(limit, (count,), generator=random, device=random.device)


def exact_ws(indices: Indices, layers: int) -> Ws:
    """Return the exact codes of faces, the same for all layers."""
    return codes.codes(codes.one_hot(indices))[:, None].expand(-1, layers, -1)


def rendered(generator: StyleGAN2, ws: Ws) -> Images:
    """Return a generator's images of latents, a few at a time."""
    return torch.cat([generator.synthesis(part) for part in ws.split(64)])


class Faces:
    """Pictures of faces, and codes to ask a generator for them with, on one device."""

    def __init__(self, folder: Path, count: int, seed: int, device: torch.device) -> None:
        z, pictures = codes.face_bank(folder, count, seed)
        self.z, self.pictures = z.to(device), pictures.to(device)
        self.indices: Indices = indices_from_z(self.z)

    @classmethod
    def banks(cls, config: Any, device: torch.device) -> tuple["Faces", "Faces"]:
        """Return the faces that a trainer learns from, and up to 512 others that judge it."""
        folder, count = config.out.parent, config.faces
        held = cls(folder, min(512, count), HELD_OUT_SEED, device)
        return cls(folder, count, config.seed, device), held

    def images(self, chosen: Chosen | slice = ALL) -> Images:
        """Return pictures as images in [-1, 1]."""
        return to_images(self.pictures[chosen])

    def blended(self, chosen: Chosen | slice, layers: int, random: torch.Generator) -> Ws:
        """Return codes of faces with values of other faces mixed in, which do not show."""
        indices = self.indices[chosen]
        other = self.indices[pick(len(self.z), len(indices), random)]
        return codes.codes(codes.blend(indices, other, random, layers))

    def mixed(self, network: StyleGAN2, chosen: Chosen, random: torch.Generator) -> Ws:
        """Return latents, a half of them blended, a quarter exact, and a quarter from z."""
        exact, mapped, *blended = chosen.tensor_split(4)
        ws = exact_ws(self.indices[exact], network.num_ws), network.mapping(self.z[mapped])
        return torch.cat([*ws, self.blended(torch.cat(blended), network.num_ws, random)])


def new_network(sizes: StyleGAN2Config) -> StyleGAN2:
    """Return an untrained network with the mapping of the codes, which is not to be trained."""
    network = StyleGAN2(sizes)
    codes.set_mapping(network.mapping_network)
    with torch.no_grad():  # what no code has would keep the weights it was drawn with
        for layer in (*network.convs, *network.to_rgbs):
            layer.affine.weight[:, VALUES:] = 0
    return network


def run(config: Config) -> None:
    device = begin(config)
    faces, held = Faces.banks(config, device)
    latents = {"w_dim": W_DIM, "z_dim": W_DIM, "mapping_layers": 2}
    sizes = StyleGAN2Config(resolution=SIZE, channels=config.channels, **latents)
    network = new_network(sizes)
    if config.start is not None:
        network = load_generator(config.start)
        if network.config != sizes:
            raise ValueError(f"--start {config.start}: expected {sizes}, found {network.config}")
    network = network.to(device)
    weight, truth, layers = importance(SIZE).to(device), held.images(), network.num_ws

    def loss_at(network: StyleGAN2, mixed: bool, step: int) -> Tensor:
        random = random_at(config.seed, step, device)
        chosen = pick(len(faces.z), config.batch_size, random)
        exact = exact_ws(faces.indices[chosen], layers)
        ws = faces.mixed(network, chosen, random) if mixed else exact
        with torch.autocast(device.type, dtype=torch.bfloat16):
            error = network.synthesis(ws) - faces.images(chosen)
        return (weight * (error.square() + 0.3 * error.abs())).mean()

    def evaluate(out: Path, average: StyleGAN2) -> dict[str, float]:
        kinds = {
            "exact": exact_ws(held.indices, layers),
            "blended": held.blended(ALL, layers, random_at(config.seed, 0, device)),
            "mapped": average.mapping(held.z),
        }
        images = {name: rendered(average, ws) for name, ws in kinds.items()}
        for name, found in images.items():
            save_pairs(truth[:32], found[:32], out / f"{name}.png")
        return {f"psnr_{name}": psnr(found, truth) for name, found in images.items()}

    def train(network: StyleGAN2, stage: str, mixed: bool, **schedule: Any) -> StyleGAN2:
        network.requires_grad_(True).mapping_network.requires_grad_(False)
        losses, out = partial(loss_at, network, mixed), config.out / stage
        figures, more = partial(evaluate, out), {"stage": stage}
        return train_by(config, network, losses, figures, out=out, more=more, **schedule)

    if config.start is None:
        steps, rate = config.exact_steps, config.exact_learning_rate
        network = train(network, "exact", False, steps=steps, learning_rate=rate, decay_from=0.9)
    network = train(network, "blends", True, decay_from=0.3)
    with command.whole_file(config.out / "generator.safetensors") as temporary:
        save_safetensors(network, temporary)  # the mapping is finer than half precision
    command.say_next(config.out, "generator.safetensors", "train its inverter and reader")
