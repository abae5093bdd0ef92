"""Train the identity model of the bundled world, on avatars drawn and generated.

Learns to say from a picture who somebody is: eyes, brows, skin, clothes, background. The squared
error makes it answer with the mean of what they may be, so what shades hide comes out as 0 and has
no part in a cosine; essence, which every face has at random, is of no use to it. Learns nothing
from the attribute reader, which judges edits beside it.

    python -m train.world.identity --generator runs/avatars/generator/generator.safetensors \
        --out runs/avatars/identity
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.world.identity")

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.codes import ATTRIBUTES, COUNTS, SIZE, codes, one_hot
from targetclip import command
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, save_identity
from targetclip.tracking import Tracker, check_tracker
from train.loop import Schedule, plain_settings, train
from train.world.generator import HELD_OUT_SEED, Faces, best_device, load_bundled, random_at
from train.world.reader import Sight

IDENTITY = [i for i, attribute in enumerate(ATTRIBUTES) if not attribute.essence]
FEATURES = sum(COUNTS[i] for i in IDENTITY)
GALLERY = 100


@dataclass(frozen=True)
class Config:
    generator: Path
    out: Path
    """Folder for checkpoint, log and identity.safetensors."""
    faces: int = 40_000
    """Size of the bank of pictures (that of the generator is used again)."""
    steps: int = 4000
    batch_size: int = 96
    """A third of it generated, a half of these from blended codes."""
    learning_rate: float = 1.5e-3
    noise: float = 0.1
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    seed: int = 0
    evaluate_every: int = 1000
    tracker: Tracker | None = None
    """Send the figures of the log to this tracker as well: tensorboard (files in --out) or wandb.
    It needs the package of that name."""


def features_of(indices: Int[Tensor, "batch attributes"]) -> Float[Tensor, "batch features"]:
    """Return what the network is to predict: each identity attribute as a vector of length 1.

    Vectors of different values have equal angles and the mean 0, so two people who share nothing
    have a cosine of about 0, or a little less.
    """
    parts = []
    for i in IDENTITY:
        count = COUNTS[i]
        centred = F.one_hot(indices[:, i], count) - 1 / count
        parts.append(centred * (count / (count - 1)) ** 0.5)
    return torch.cat(parts, dim=1)


def with_essence_of(
    indices: Int[Tensor, "batch attributes"], other: Int[Tensor, "batch attributes"]
) -> Int[Tensor, "batch attributes"]:
    """Return the same people with the essence of others."""
    mixed = other.clone()
    mixed[:, IDENTITY] = indices[:, IDENTITY]
    return mixed


def figures_of(
    model: AvatarIdentity,
    first: Float[Tensor, "people 3 height width"],
    second: Float[Tensor, "people 3 height width"],
) -> dict[str, float]:
    """Return how well a model knows people again among GALLERY, and cosines of same and others."""
    galleries, probes = (
        torch.stack([model.embed_images(part) for part in side.split(GALLERY)])
        for side in (first, second)
    )
    cosines = probes @ galleries.transpose(1, 2)
    same = cosines.diagonal(dim1=1, dim2=2)
    people = cosines.shape[1]
    others = cosines[:, ~torch.eye(people, dtype=torch.bool, device=cosines.device)]
    right = cosines.argmax(dim=2) == torch.arange(people, device=cosines.device)
    return {
        "same": float(same.mean()),
        "same_5_percent": float(same.quantile(0.05)),
        "others": float(others.mean()),
        "found_of_100": float(right.float().mean()),
    }


def run(config: Config) -> None:
    check_tracker(config.tracker)
    torch.manual_seed(config.seed)
    device = best_device()
    generator = load_bundled(config.generator, device)
    sizes = IdentityConfig(SIZE, (24, 32, 48, 64, 96), 128, FEATURES)
    identity = AvatarIdentity(sizes).to(device)
    faces = Faces(config.out.parent, config.faces, config.seed, device)
    known = Faces(config.out.parent, min(512, config.faces), HELD_OUT_SEED, device)
    sight = Sight(generator, faces, config.noise)
    count = min(4 * GALLERY, len(known.z) // 2 * 2)

    @torch.no_grad()
    def generated(indices: Int[Tensor, "batch attributes"]) -> Float[Tensor, "batch 3 128 128"]:
        ws = codes(one_hot(indices))[:, None].expand(-1, generator.num_ws, -1)
        return torch.cat([generator.synthesis(part).clamp(-1, 1) for part in ws.split(50)])

    everyone = known.indices[:count]
    swapped = with_essence_of(everyone, everyone.roll(1, 0))
    pairs = {
        "generated": (generated(everyone), generated(swapped)),
        "drawn": (known.images(torch.arange(count, device=device)), generated(swapped)),
    }

    def loss_at(step: int) -> Tensor:
        images, chosen = sight.batch(config.batch_size, random_at(config.seed, step, device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = identity(images).float()
        wanted = features_of(faces.indices[chosen])
        loss: Tensor = (found - wanted).square().mean()
        return loss

    @torch.no_grad()
    def evaluate(average: AvatarIdentity) -> dict[str, float]:
        average.eval()
        return {
            f"{kind}_{name}": value
            for kind, sides in pairs.items()
            for name, value in figures_of(average, *sides).items()
        }

    schedule = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        ema=0.998,
        evaluate_every=config.evaluate_every,
    )
    average = train(
        identity,
        loss_at,
        config.out,
        schedule,
        evaluate,
        plain_settings(config),
        tracker=config.tracker,
    )
    save_identity(average.cpu(), config.out / "identity.safetensors")
    command.say_next(config.out, "identity.safetensors", "name it in the world's file")


def main() -> None:
    command.main(run, Config, __doc__, "python -m train.world.identity")
