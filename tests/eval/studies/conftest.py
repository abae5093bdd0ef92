"""A small world of avatars' size, whose pictures the attribute reader takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.illustrated.codes import SIZE, VALUES, W_DIM
from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from predictor.tradeoff import UNITS, TradeoffConfig
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, save_identity
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world

NEUTRAL = 'neutral = ["a face", "a person"]\n'
IDENTITY = 'identity = "identity.safetensors"\n'
WIDTHS = (8, 8, 8, 8, 8)


@pytest.fixture(scope="session")
def face_world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny world, of 128 px and with a coordinate of z for each value of a face."""
    folder = tmp_path_factory.mktemp("faces")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(
                resolution=SIZE,
                w_dim=W_DIM,
                z_dim=VALUES,
                mapping_layers=2,
                # Narrow where maps are large: a study renders hundreds of images.
                channels=(8, 8, 8, 8, 4, 4),
            )
        )
        config = InverterConfig(
            resolution=SIZE,
            num_ws=generator.num_ws,
            w_dim=W_DIM,
            generator=generator.fingerprint,
            channels=WIDTHS,
            hidden=16,
        )
        save_inverter(Inverter(config), folder / "inverter.safetensors")
        identity = AvatarIdentity(
            IdentityConfig(resolution=SIZE, channels=WIDTHS, hidden=16, features=5)
        )
        save_identity(identity, folder / "identity.safetensors")
    save_safetensors(generator, folder / "generator.safetensors")
    path = folder / "world.toml"
    path.write_text(tiny_world.read_text() + IDENTITY + NEUTRAL)
    return path


@pytest.fixture(scope="session")
def scene(face_world: Path) -> Scene:
    return load_scene(load_world(str(face_world)), torch.device("cpu"))


@pytest.fixture(scope="session")
def write_mapper(scene: Scene) -> Callable[..., Path]:
    """Writes mappers of random weights, whose answers differ from target to target."""

    def written(
        path: Path, recipe: dict[str, Any], seed: int = 0, tradeoff: TradeoffConfig | None = None
    ) -> Path:
        generator, embedder = scene.generator, scene.embedder
        config = MapperConfig(
            embed_dim=embedder.embed_dim,
            num_ws=generator.num_ws,
            w_dim=generator.w_dim,
            generator=generator.fingerprint,
            embedder=embedder.fingerprint,
            width=8,
            depth=1,
            tradeoff=tradeoff,
        )
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            mapper = Mapper(config)
            torch.nn.init.normal_(mapper.direction.weight)
            if mapper.keep_gain is not None:
                mapper.keep_gain.weight[:, 0] -= (
                    0.5 / UNITS[0]
                )  # shorter where more identity is kept
        path.parent.mkdir(parents=True, exist_ok=True)
        record = MapperRecord(
            recipe=recipe, calibration={}, licence="MIT", trained_on="nothing", version="0"
        )
        save_mapper(mapper, path, record)
        return path

    return written
