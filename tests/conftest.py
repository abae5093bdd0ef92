"""Small stand-ins shared by the tests: no download, random weights from a fixed seed."""

import copy
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

# One thread, here and in subprocesses, set before torch looks: tiny tensors gain nothing from more,
# and several threads beside another job wait for each other at every operation.
os.environ["OMP_NUM_THREADS"] = "1"
# Nor is the network asked, or a cache of the user's read; the tests' own is removed at the end.
os.environ["HF_HOME"] = mkdtemp()
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import CorrectionConfig, MapperConfig, MapperRecord
from predictor.tradeoff import TradeoffConfig
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, save_identity
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.world import load_scene, load_world

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def pytest_collection_finish() -> None:
    """Exempt all that is imported from collections of garbage, which else go through it again and
    again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def vocabulary_read_once() -> Iterator[None]:
    """Read CLIP's vocabulary once, and not for every world, which takes as long as the rest of a
    tiny one."""
    from open_clip import factory

    gc.freeze()  # as after the other imports
    made = cache(factory.SimpleTokenizer)

    def tokenizer(**settings: Any) -> object:
        return copy.copy(made(**settings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "SimpleTokenizer", tokenizer)
        yield


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package one that is not installed."""

    def hide(package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)

    return hide


@pytest.fixture(scope="session")
def clip_dir(vocabulary_read_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `ClipEmbedder.load`: 32-dim embeddings, 64 px input, GELU."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny_clip")
    config = {"model_cfg": TINY_CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        clip = open_clip.model.CLIP(**TINY_CLIP)
        # Fresh weights give any two pictures a cosine of 0.99; enlarged ones tell them apart.
        for parameter in clip.visual.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_world(clip_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world.toml to give as --world: a 16 px generator, the tiny CLIP, an inverter."""
    folder = tmp_path_factory.mktemp("tiny_world")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(resolution=16, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8, 8))
        )
        inverter = Inverter(
            InverterConfig(
                resolution=16,
                num_ws=generator.num_ws,
                w_dim=8,
                generator=generator.fingerprint,
                channels=(8, 8),
                hidden=16,
            )
        )
    save_safetensors(generator, folder / "generator.safetensors")
    save_inverter(inverter, folder / "inverter.safetensors")
    world = folder / "world.toml"
    world.write_text(
        f"""name = "tiny"
generator = "generator.safetensors"
embedder = {json.dumps(str(clip_dir))}
inverter = "inverter.safetensors"
recipe = "consistent"
strength = 1.0
truncation = 1.0
"""
    )
    return world


@pytest.fixture(scope="session")
def who_world(tiny_world: Path) -> Path:
    """The tiny world with an identity model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        identity = AvatarIdentity(
            IdentityConfig(resolution=16, channels=(8, 8), hidden=16, features=5)
        )
    save_identity(identity, tiny_world.with_name("who.safetensors"))
    world = tiny_world.with_name("who.toml")
    world.write_text(tiny_world.read_text() + 'identity = "who.safetensors"\n')
    return world


def write_mapper(
    path: Path,
    world: Path,
    correction: CorrectionConfig | None = None,
    tradeoff: TradeoffConfig | None = None,
) -> Path:
    """Write a calibrated mapper for a world, of random weights."""
    scene = load_scene(load_world(str(world)))
    config = MapperConfig(
        embed_dim=32,
        num_ws=scene.generator.num_ws,
        w_dim=8,
        generator=scene.generator.fingerprint,
        embedder=scene.embedder.fingerprint,
        width=16,
        depth=1,
        correction=correction,
        tradeoff=tradeoff,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mapper = Mapper(config)
    numbers = torch.Generator().manual_seed(1)
    for tensor in mapper.state_dict().values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=numbers))
    calibration = {"threshold": 0.5, "probes": 4, "refine_steps": 6, "refine_rate": 0.5}
    if tradeoff is not None:
        calibration |= {"keep_identity": 0.25, "threshold_at_0": 0.6, "threshold_at_1": 0.2}
    record = MapperRecord(
        recipe={"name": "random"},
        calibration=calibration,
        licence="MIT",
        trained_on="nothing",
        version="0.1.0",
    )
    save_mapper(mapper, path, record)
    return path


@pytest.fixture(scope="session")
def tiny_mapper(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated mapper's file for the tiny world, of random weights: far from any target."""
    return write_mapper(tmp_path_factory.mktemp("mapper") / "mapper.safetensors", tiny_world)


@pytest.fixture(scope="session")
def reading_mapper(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a correction that differs from source to source."""
    path = tmp_path_factory.mktemp("reading") / "mapper.safetensors"
    return write_mapper(path, tiny_world, CorrectionConfig(rank=5, width=32))


@pytest.fixture(scope="session")
def tradeoff_mapper(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, that reads the trade-off as well."""
    path = tmp_path_factory.mktemp("tradeoff") / "mapper.safetensors"
    ends = TradeoffConfig(identity_weights=(0.05, 1.0), decays=(1e-3, 3e-2))
    return write_mapper(path, tiny_world, CorrectionConfig(rank=5, width=32), ends)
