"""Train the identity model of the bundled world, on avatars drawn and generated.

Learns to say from a picture who somebody is: eyes, brows, skin, clothes, background. The squared
error makes it answer with the mean of what they may be, so what shades hide comes out as 0 and has
no part in a cosine; essence, which every face has at random, is of no use to it. Learns nothing
from the attribute reader, which judges edits beside it.

    python -m train.world.identity --generator runs/avatars/generator/generator.safetensors \
        --out runs/avatars/identity
"""

from dataclasses import dataclass
from pathlib import Path

from targetclip import command
from targetclip.command import start
from train.world.settings import SeeingTraining


@dataclass(frozen=True, kw_only=True)
class Config(SeeingTraining):
    out: Path
    """Folder for checkpoint, log and identity.safetensors."""
    learning_rate: float = 1.5e-3


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.world.identity", Config)

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.codes import ATTRIBUTES, COUNTS, SIZE, Indices
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, save_identity
from train.loop import train_by
from train.world import reader
from train.world.generator import Images, random_at

IDENTITY = [i for i, attribute in enumerate(ATTRIBUTES) if not attribute.essence]
FEATURES = sum(COUNTS[i] for i in IDENTITY)
GALLERY = 100


def features_of(indices: Indices) -> Float[Tensor, "batch features"]:
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


def with_essence_of(indices: Indices, other: Indices) -> Indices:
    """Return the same people with the essence of others."""
    places = torch.tensor(IDENTITY, device=other.device)
    return other.index_copy(1, places, indices[:, places])


def figures_of(model: AvatarIdentity, first: Images, second: Images) -> dict[str, float]:
    """Return how well a model knows people again among GALLERY, and cosines of same and others."""
    galleries, probes = (
        torch.stack([model.embed_images(part) for part in side.split(GALLERY)])
        for side in (first, second)
    )
    cosines = probes @ galleries.transpose(1, 2)
    same = cosines.diagonal(dim1=1, dim2=2)
    places = torch.arange(cosines.shape[1], device=cosines.device)
    others = cosines[:, places[:, None] != places]
    right = cosines.argmax(dim=2) == places
    return {
        "same": float(same.mean()),
        "same_5_percent": float(same.quantile(0.05)),
        "others": float(others.mean()),
        "found_of_100": float(right.float().mean()),
    }


def run(config: Config) -> None:
    sight = reader.Sight(config)
    faces, known = sight.faces, sight.known
    device, count = faces.z.device, min(4 * GALLERY, len(known.z) // 2 * 2)
    identity = AvatarIdentity(IdentityConfig(SIZE, (24, 32, 48, 64, 96), 128, FEATURES)).to(device)
    everyone = known.indices[:count]
    swapped = with_essence_of(everyone, everyone.roll(1, 0))
    pairs = {
        "generated": (sight.exact(everyone), sight.exact(swapped)),
        "drawn": (known.images(slice(count)), sight.exact(swapped)),
    }

    def loss_at(step: int) -> Tensor:
        images, chosen = sight.batch(config.batch_size, random_at(config.seed, step, device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = identity(images).float()
        return F.mse_loss(found, features_of(faces.indices[chosen]))

    def evaluate(average: AvatarIdentity) -> dict[str, float]:
        read = {kind: figures_of(average, *sides) for kind, sides in pairs.items()}
        return {f"{kind}_{k}": value for kind, one in read.items() for k, value in one.items()}

    average = train_by(config, identity, loss_at, evaluate, ema=0.998)
    save_identity(average.cpu(), config.out / "identity.safetensors")
    command.say_next(config.out, "identity.safetensors", "name it in the world's file")
