"""Train the identity model of the bundled world, on drawn faces and on generated ones.

Learns to say from a picture which identity parameters its face has. The squared error makes it
answer with the mean of what they may be, so what a hat, a beard or a backdrop hides comes out as 0
and has no part in a cosine. Essence, which every face of a batch has at random, is of no use to
it. Learns nothing from the attribute reader, which judges edits beside it.

    python -m train.drawn.identity --generator G --out runs/identity
    python -m train.drawn.identity --generator G --out runs/identity --measure F  # of a file
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.drawn.identity")

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from data.drawn.faces import (
    draw_parameters,
    draw_wide,
    faces_from_z,
    sample_z,
    to_images,
    wide_face,
    ws_from_z,
)
from data.drawn.sketch import ESSENCE, IDENTITY, NAMES, Face, draw
from targetclip import command
from targetclip.command import Stop, make_folder, write_json
from targetclip.encoders.identity import (
    IdentityConfig,
    IdentityModel,
    SketchIdentity,
    load_identity,
    save_identity,
)
from targetclip.generators import load_generator
from targetclip.generators.stylegan2 import StyleGAN2, normalize_latent
from targetclip.seeds import WORLD_TARGETS
from train.drawn.generator import HELD_OUT_SEED, face_bank
from train.loop import Schedule, plain_settings, train

WAVES = 3
GALLERY = 100
TEST_SEED = WORLD_TARGETS  # neither that of training nor of validation

Pair = tuple[Float[Tensor, "people 3 height width"], Float[Tensor, "people 3 height width"]]


@dataclass(frozen=True)
class Config:
    generator: Path
    out: Path
    """Folder for checkpoint, log, identity.safetensors and report.json."""
    measure: Path | None = None
    """An identity file to measure; nothing is trained."""
    faces: int = 150_000
    """Size of the bank of drawn faces (that of the generator is used again)."""
    steps: int = 5000
    batch_size: int = 64
    """A quarter of it samples of the generator, an eighth faces in other styles, drawn anew."""
    learning_rate: float = 1.5e-3
    noise: float = 0.1
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    galleries: int = 5
    """Held-out groups of 100 people, in each of which the right one is looked for."""
    seed: int = 0
    evaluate_every: int = 500


def features_of(
    parameters: Float[Tensor, "batch parameters"],
) -> Float[Tensor, "batch features"]:
    """What the network is to predict: each identity parameter as a few cosines.

    Over people, whose parameters are uniform in [0, 1], features have mean 0 and variance 1 and
    none says anything of another. The first wave tells the ends of a scale apart, the next ones
    finer steps: unlike people come closer to 0 than by the parameters alone.
    """
    own = parameters[:, [NAMES.index(name) for name in IDENTITY]].float()
    waves = math.pi * torch.arange(1, WAVES + 1)
    return math.sqrt(2) * torch.cos(own[..., None] * waves).flatten(1)


def with_essence_of(
    z: Float[Tensor, "batch groups z_dim"], other: Float[Tensor, "batch groups z_dim"]
) -> Float[Tensor, "batch groups z_dim"]:
    """Latents of the same people with the essence of others.

    Raises:
        ValueError: z is too short; twice as long as a face has parameters is enough.
    """
    essence = [NAMES.index(name) for name in ESSENCE]
    unit, others = (normalize_latent(a.flatten(0, 1)).unflatten(0, a.shape[:2]) for a in (z, other))
    unit[..., essence] = others[..., essence]
    # The length must stay what it was, or identity would move with it; no parameter reads the
    # coordinates that make up for it.
    drawn, free = unit[..., : len(NAMES)], unit[..., len(NAMES) :]
    left = z.shape[-1] - drawn.square().sum(dim=-1, keepdim=True)
    if (left <= 0).any():
        raise ValueError(
            f"expected a generator with z_dim {2 * len(NAMES)} or more, found {z.shape[-1]}"
        )
    return torch.cat([drawn, free * (left / free.square().sum(dim=-1, keepdim=True)).sqrt()], -1)


@torch.no_grad()
def held_out_pairs(generator: StyleGAN2, count: int, seed: int) -> dict[str, Pair]:
    """People seen twice, the second time with another's essence: drawn, styled and generated."""
    latents = sample_z(count, generator.z_dim, seed)
    both = (latents, with_essence_of(latents, sample_z(count, generator.z_dim, seed + 1)))
    first, second = ([*faces_from_z(z).numpy()] for z in both)
    drawn = [to_images(np.stack([draw_parameters(v) for v in side])) for side in (first, second)]
    styled = [
        np.asarray(draw(Face(*values.tolist()), style=wide_face(seed, i, 1.0, 0.0)[2]))
        for i, values in enumerate(second)
    ]
    made = [
        torch.cat([generator.synthesis(ws_from_z(generator, part)) for part in z.split(64)])
        for z in both
    ]
    return {
        "drawn": (drawn[0], drawn[1]),
        "styled": (drawn[0], to_images(np.stack(styled))),
        "generated": (made[0].clamp(-1, 1), made[1].clamp(-1, 1)),
    }


@torch.no_grad()
def figures_of(model: IdentityModel, pairs: dict[str, Pair]) -> dict[str, float]:
    """How well a model knows people again: cosines, and how often the right one of 100 is found."""
    figures: dict[str, float] = {}
    for name, (first, second) in pairs.items():
        galleries = [model.embed_images(part) for part in first.split(GALLERY)]
        probes = [model.embed_images(part) for part in second.split(GALLERY)]
        cosines = torch.stack([p @ g.T for p, g in zip(probes, galleries, strict=True)])
        same = cosines.diagonal(dim1=1, dim2=2)
        others = cosines[:, ~torch.eye(GALLERY, dtype=torch.bool)]
        right = cosines.argmax(dim=2) == torch.arange(GALLERY)
        figures |= {
            f"{name}_same": float(same.mean()),
            f"{name}_same_5_percent": float(same.quantile(0.05)),
            f"{name}_others": float(others.mean()),
            f"{name}_others_99_percent": float(others.quantile(0.99)),
            f"{name}_found_of_100": float(right.float().mean()),
        }
    return figures


@torch.no_grad()
def changed_alone(model: IdentityModel, count: int, seed: int) -> dict[str, float]:
    """Mean cosine of drawn people to themselves with one identity parameter of another's.

    Nearly 1 says that a model does not see the parameter.
    """
    z_dim = 2 * len(NAMES)
    people, others = (faces_from_z(sample_z(count, z_dim, seed + i)).numpy() for i in range(2))

    def embed(faces: Float[ndarray, "batch parameters"]) -> Float[Tensor, "batch features"]:
        return model.embed_images(to_images(np.stack([draw_parameters(row) for row in faces])))

    before = embed(people)
    cosines: dict[str, float] = {}
    for name in IDENTITY:
        changed = people.copy()
        changed[:, NAMES.index(name)] = others[:, NAMES.index(name)]
        cosines[name] = float((before * embed(changed)).sum(dim=1).mean())
    return cosines


def measure(config: Config, path: Path) -> None:
    """Write and print the figures of an identity file on people no network was trained on."""
    generator = load_generator(config.generator)
    pairs = held_out_pairs(generator, GALLERY * config.galleries, TEST_SEED)
    identity = load_identity(path)
    report: dict[str, Any] = figures_of(identity, pairs)
    report["changed_alone"] = changed_alone(identity, GALLERY, TEST_SEED)
    make_folder(config.out)
    write_json(config.out / "report.json", report)
    print(json.dumps(report, indent=2))


def train_identity(config: Config, stop: Stop | None = None) -> SketchIdentity:
    """Train, or go on training, in `config.out`; returns the averaged network."""
    torch.manual_seed(config.seed)
    generator = load_generator(config.generator)
    identity = SketchIdentity(IdentityConfig(features=WAVES * len(IDENTITY)))
    z, pictures = face_bank(config.out.parent, config.faces, config.seed, generator.w_dim)
    parameters = faces_from_z(z)
    held = held_out_pairs(generator, GALLERY * config.galleries, HELD_OUT_SEED)
    made, wide = config.batch_size // 4, config.batch_size // 8

    def loss_at(step: int) -> Tensor:
        seed = config.seed * 1_000_000_007 + step
        random = torch.Generator().manual_seed(seed)
        fresh = sample_z(made, generator.z_dim, seed)
        chosen = torch.randint(len(z), (config.batch_size - made - wide,), generator=random)
        keys = [(config.seed, step * wide + i) for i in range(wide)]
        styled = to_images(np.stack([draw_wide(key) for key in keys]))
        values = np.stack([wide_face(*key)[0].values() for key in keys])
        faces = torch.cat([faces_from_z(fresh), parameters[chosen], torch.from_numpy(values)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                samples = generator.synthesis(ws_from_z(generator, fresh)).clamp(-1, 1)
            images = torch.cat([samples.float(), to_images(pictures[chosen.numpy()]), styled])
            deviation = config.noise * torch.rand(len(images), 1, 1, 1, generator=random)
            images = images + deviation * torch.randn(images.shape, generator=random)
            found = identity(images).float()
        loss: Tensor = (found - features_of(faces)).square().mean()
        return loss

    def evaluate(average: SketchIdentity) -> dict[str, float]:
        return figures_of(average.eval(), held)

    schedule = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        ema=0.998,
        evaluate_every=config.evaluate_every,
    )
    settings = plain_settings(config, generator=generator.fingerprint)
    return train(identity, loss_at, config.out, schedule, evaluate, settings, stop=stop)


def run(config: Config) -> None:
    command.make_folder(config.out)
    then = "name it as identity in a world's .toml file"
    if config.measure is not None:
        measure(config, config.measure)
        command.say_next(config.out, "report.json", then)
        return
    path = config.out / "identity.safetensors"
    average = train_identity(config)
    save_identity(average, path)
    measure(config, path)
    command.say_next(config.out, "identity.safetensors, report.json, log.jsonl", then)


def main() -> None:
    """Run the command line."""
    command.main(run, Config, __doc__, "python -m train.drawn.identity")
