"""Inverters: the encoder, its file, and the search."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from targetclip.encoders.inverter import (
    FORMAT,
    InversionConfig,
    Inverter,
    InverterConfig,
    LatentInverter,
    OptimizingInverter,
    invert_by_optimization,
    load_inverter,
    pixel_loss,
    save_inverter,
)
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world

CONFIG = InverterConfig(
    resolution=16, num_ws=6, w_dim=8, generator="a" * 64, channels=(8, 16), hidden=12
)


@pytest.fixture
def inverter() -> Inverter:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Inverter(CONFIG)
        network.mean_w.copy_(torch.randn(8))
    return network.requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def error_of(path: Path, generator: str = CONFIG.generator) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_inverter(path, generator)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_picture_becomes_an_offset_from_the_mean_for_every_layer(inverter: Inverter) -> None:
    ws = inverter(images())
    assert ws.shape == (3, 6, 8)
    mean = inverter.mean_w.clone()
    inverter.mean_w.zero_()
    torch.testing.assert_close(ws, inverter(images()) + mean)


def test_a_picture_gives_the_same_latents_alone_and_among_others(inverter: Inverter) -> None:
    together = inverter(images())
    for i in range(3):
        torch.testing.assert_close(inverter(images()[i : i + 1])[0], together[i])
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 16, 8)])
def test_images_of_another_shape_are_refused(inverter: Inverter, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[batch, 3, 16, 16\]"):
        inverter(torch.zeros(shape))


def test_a_saved_inverter_is_the_same_but_for_half_precision(
    inverter: Inverter, tmp_path: Path
) -> None:
    path = tmp_path / "inverter.safetensors"
    save_inverter(inverter, path)
    loaded = load_inverter(path, CONFIG.generator)
    assert loaded.config == CONFIG and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(images()), inverter(images()), rtol=1e-2, atol=5e-3)
    for name, tensor in inverter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name


def test_an_inverter_of_another_generator_is_refused(inverter: Inverter, tmp_path: Path) -> None:
    path = tmp_path / "inverter.safetensors"
    save_inverter(inverter, path)
    message = error_of(path, "b" * 64)
    assert "a" * 12 in message and "b" * 12 in message


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": "another/1"}, "found another/1"),
        ({"config": None}, "config is damaged"),
        ({"config": "[]"}, "config is damaged"),
        ({"config": json.dumps({**asdict(CONFIG), "colour": 1})}, "config is damaged"),
        ({"config": json.dumps({**asdict(CONFIG), "channels": [8]})}, "weights do not fit"),
    ],
)
def test_a_file_that_is_not_an_inverter_is_refused(
    inverter: Inverter, tmp_path: Path, metadata: dict[str, str | None], said: str
) -> None:
    path = tmp_path / "inverter.safetensors"
    assert "no such" in error_of(path)
    whole = {"format": FORMAT, "config": json.dumps(asdict(CONFIG)), **metadata}
    entries = {name: text for name, text in whole.items() if text is not None}
    save_file(inverter.state_dict(), path, entries)
    assert said in error_of(path)


# The search

SHORT = InversionConfig(steps=12, learning_rate=0.2)


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)), torch.device("cpu"))


@pytest.fixture(scope="module")
def renderings(scene: Scene) -> Tensor:
    return scene.render(scene.latents([1, 2, 3]))


def searching(
    scene: Scene, config: InversionConfig, first: LatentInverter | None = None, at_once: int = 4
) -> OptimizingInverter:
    return OptimizingInverter(
        generator=scene.generator,
        embedder=scene.embedder,
        first=first,
        config=config,
        at_once=at_once,
    )


def mean_start(scene: Scene, count: int) -> Tensor:
    return scene.generator.mean_w.repeat(count, scene.generator.num_ws, 1)


def test_latents_found_show_the_picture_better_than_the_start(
    scene: Scene, renderings: Tensor
) -> None:
    start = mean_start(scene, 3)
    steps: list[float] = []
    ws = invert_by_optimization(
        scene.generator, scene.embedder, renderings, start, SHORT, steps.append
    )
    before, after = (pixel_loss(scene.render(ws), renderings) for ws in (start, ws))
    assert (after < 0.7 * before).all()
    assert len(steps) == SHORT.steps and steps[-1] < steps[0]


def test_a_batch_of_pictures_is_searched_as_each_alone(scene: Scene, renderings: Tensor) -> None:
    together = searching(scene, SHORT, at_once=3)(renderings)
    alone = searching(scene, SHORT, at_once=1)(renderings)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_the_search_starts_where_the_first_inverter_says(scene: Scene, renderings: Tensor) -> None:
    none = InversionConfig(steps=0)
    inverter = searching(scene, none, first=scene.inverter)
    assert isinstance(inverter, LatentInverter) and scene.inverter is not None
    with torch.no_grad():  # as its callers have it
        assert torch.equal(inverter(renderings), scene.inverter(renderings))


def test_steps_that_lead_away_are_not_kept(scene: Scene, renderings: Tensor) -> None:
    wild = InversionConfig(steps=3, learning_rate=1e4)
    start = mean_start(scene, 3)
    ws = invert_by_optimization(scene.generator, scene.embedder, renderings, start, wild)
    assert torch.equal(ws, start)


def test_a_prior_keeps_latents_near_the_start(scene: Scene, renderings: Tensor) -> None:
    start = mean_start(scene, 3)
    distances = [
        (
            invert_by_optimization(
                scene.generator,
                scene.embedder,
                renderings,
                start,
                InversionConfig(steps=12, learning_rate=0.2, prior_weight=weight),
            )
            - start
        ).norm()
        for weight in (0.0, 100.0)
    ]
    assert distances[1] < 0.2 * distances[0]


def test_a_loss_that_is_not_finite_is_an_error(scene: Scene, renderings: Tensor) -> None:
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        invert_by_optimization(
            scene.generator, scene.embedder, renderings * torch.nan, mean_start(scene, 3), SHORT
        )


def test_small_pictures_weigh_as_much_as_large_ones() -> None:
    # A chequerboard of single pixels is grey at every smaller size.
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    images = board.expand(1, 3, 32, 32)
    assert float(pixel_loss(images, torch.zeros_like(images))) == pytest.approx(0.5)
