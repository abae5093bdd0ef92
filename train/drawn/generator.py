"""Train the generator of the bundled world: latents to faces, by plain regression.

Each z stands for known face parameters (`data.drawn.faces`), so the right picture of every latent
is known and no discriminator is needed. Half of the latents mix three z in W+, one a group of
layers, with the picture known as well: edits in W+ then change what their layers own.

    python -m train.drawn.generator --out runs/generator                            # hours; resumes
    python -m train.drawn.generator --out runs/try --half-steps 9 --steps 9 --faces 2000     # a try
    python -m train.drawn.generator --out runs/more --start generator.safetensors          # further
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.drawn.generator")

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.drawn.faces import (
    GROUPS,
    bank,
    draw_parameters,
    faces_from_z,
    psnr,
    sample_z,
    to_images,
    ws_from_z,
)
from data.drawn.readings import truth_of
from data.drawn.sketch import SIZE
from targetclip import command
from targetclip.command import whole_file
from targetclip.generators import load_generator
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.media.images import labelled_grid, tensor_to_pictures
from train.loop import CHECKPOINT, Schedule, plain_settings, train

HELD_OUT_SEED = 1_000_003
MAPPING_RATE = 30.0  # its weights are stored a hundred times larger than they act


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for checkpoint, log, pictures and generator.safetensors."""
    start: Path | None = None
    """A generator to train further; the mapping and the 32 px level are then taken from it."""
    faces: int = 150_000
    """Pictures drawn once and kept to train on."""
    half_steps: int = 6000
    """Steps at 32 px, before the 64 px level is added."""
    steps: int = 12_000
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0
    evaluate_every: int = 1000
    channels: tuple[int, ...] = (96, 96, 64, 48, 24)
    """Widths at 4, 8, ... 64 px."""
    w_dim: int = 128
    mapping_layers: int = 4


def save_pairs(
    truth: Float[Tensor, "batch 3 height width"],
    images: Float[Tensor, "batch 3 height width"],
    path: Path,
) -> None:
    """A picture to look at while something trains: rows of what was wanted and what came out."""
    rows: dict[str, list[Image.Image]] = {}
    for start in range(0, len(truth), 8):
        rows[f"wanted {start}"] = tensor_to_pictures(truth[start : start + 8])
        rows[f"found {start}"] = tensor_to_pictures(images[start : start + 8])
    labelled_grid(None, rows).save(path)


def importance() -> Float[Tensor, "1 1 64 64"]:
    """Weight of each pixel in the loss: what people look at in a face counts double."""
    weight = torch.ones(1, 1, SIZE, SIZE)
    weight[:, :, 22:52, 14:50] = 2.0
    return weight / weight.mean()


def teach_mapping(network: StyleGAN2, seed: int, steps: int = 12_000) -> float:
    """Start the mapping network off knowing faces: make w linear in what a picture shows.

    What a latent stands for is known before any picture is drawn, so this takes a minute where the
    picture loss alone would look for it for hours. Returns the part of the variance of the
    readings that w leaves unexplained.
    """
    z = torch.randn(60_000, 1, network.z_dim, generator=torch.Generator().manual_seed(seed))
    values, _ = truth_of(faces_from_z(z.expand(-1, len(GROUPS), -1)).numpy())
    truth = torch.from_numpy(values)
    truth = (truth - truth.mean(dim=0)) / truth.std(dim=0)
    probe = nn.Linear(network.w_dim, truth.shape[1])
    groups = [
        {"params": network.mapping_network.parameters(), "lr": 2.0},
        {"params": probe.parameters(), "lr": 2e-2},
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    random = torch.Generator().manual_seed(seed)
    error = math.nan
    for _ in tqdm(range(steps), "mapping"):
        chosen = torch.randint(len(z), (256,), generator=random)
        loss = (probe(network.mapping_network(z[chosen, 0])) - truth[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        error = loss.item()
    return error


def face_bank(
    folder: Path, count: int, seed: int, z_dim: int
) -> tuple[Float[Tensor, "count groups z_dim"], UInt8[ndarray, "count 64 64 3"]]:
    """Latents and the pictures they stand for; the pictures are kept in `folder`."""
    z = sample_z(count, z_dim, seed)
    parameters = list(faces_from_z(z).numpy())
    return z, bank(folder / f"faces-{seed}-{count}.npy", parameters, draw_parameters)


def train_at(config: Config, network: StyleGAN2, steps: int, out: Path) -> StyleGAN2:
    """Train a network on pictures shrunk to its resolution; returns the averaged weights."""
    shrink = SIZE // network.resolution
    z, pictures = face_bank(config.out.parent, config.faces, config.seed, config.w_dim)
    held_z, held_pictures = face_bank(config.out.parent, 512, HELD_OUT_SEED, config.w_dim)
    held = F.avg_pool2d(to_images(held_pictures[:]), shrink)
    weight = F.avg_pool2d(importance(), shrink)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed * 1_000_000_007 + step)
        chosen = torch.randint(len(z), (config.batch_size,), generator=generator)
        truth = F.avg_pool2d(to_images(pictures[chosen.numpy()]), shrink)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = network.synthesis(ws_from_z(network, z[chosen]))
        error = images - truth
        return (weight * (error.square() + 0.3 * error.abs())).mean()

    def evaluate(average: StyleGAN2) -> dict[str, float]:
        with torch.no_grad():
            images = torch.cat(
                [average.synthesis(ws_from_z(average, part)) for part in held_z.split(64)]
            )
        save_pairs(held[:32], images[:32], out / "grid.png")
        return {"psnr": psnr(images, held), "psnr_mixed": psnr(images[1::2], held[1::2])}

    start = None if config.start is None else load_generator(config.start).fingerprint
    mapping = list(network.mapping_network.parameters())
    others = [p for n, p in network.named_parameters() if not n.startswith("mapping_network")]
    return train(
        network,
        loss_at,
        out,
        Schedule(
            steps=steps, learning_rate=config.learning_rate, evaluate_every=config.evaluate_every
        ),
        evaluate,
        plain_settings(config, start=start, resolution=network.resolution),
        groups=[{"params": mapping, "lr": MAPPING_RATE}, {"params": others, "lr": 1.0}],
    )


def start_small(config: Config, sizes: StyleGAN2Config) -> StyleGAN2:
    """A network trained without its last level: it sees more pictures in the same time."""
    half = StyleGAN2(replace(sizes, resolution=SIZE // 2, channels=sizes.channels[:-1]))
    first = config.out / "half"
    if not (first / CHECKPOINT).exists():
        print(f"unexplained by w: {teach_mapping(half, config.seed):.3f}")
    half = train_at(config, half, config.half_steps, first)
    network = StyleGAN2(sizes)
    network.load_state_dict(half.state_dict(), strict=False)
    return network


def run(config: Config) -> None:
    command.make_folder(config.out)
    torch.manual_seed(config.seed)
    sizes = StyleGAN2Config(
        resolution=SIZE,
        w_dim=config.w_dim,
        z_dim=config.w_dim,
        mapping_layers=config.mapping_layers,
        channels=config.channels,
    )
    if config.start is None:
        network = start_small(config, sizes)
    else:
        network = load_generator(config.start).float().requires_grad_(True)
        if network.config != sizes:
            raise ValueError(
                f"--start: expected a generator of {sizes}, found {network.config}: give its sizes "
                "by --channels, --w-dim and --mapping-layers"
            )
    average = train_at(config, network, config.steps, config.out)
    with torch.no_grad():
        many = torch.randn(100_000, config.w_dim, generator=torch.Generator().manual_seed(0))
        average.mapping_network.w_avg.copy_(average.mapping_network(many).mean(dim=0))
    with whole_file(config.out / "generator.safetensors") as temporary:
        save_safetensors(average, temporary, torch.float16)
    then = f"python -m train.drawn.inverter --generator {config.out}/generator.safetensors"
    command.say_next(config.out, "generator.safetensors, log.jsonl", f"{then} --out INVERTER")


def main() -> None:
    """Run the command line."""
    command.main(run, Config, __doc__, "python -m train.drawn.generator")
