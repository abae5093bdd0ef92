"""Fine-tuning an inverter into an encoder of directions: from where, on what, and going on."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import builds_made
import numpy as np
import pytest
import torch
from torch import Tensor

from data.targets import Target, open_targets, split_of
from targetclip.command import Stop, Stopped, guarded
from targetclip.encoders.inverter import Inverter, load_inverter, save_inverter
from targetclip.media.images import picture_to_tensor
from targetclip.recipes import Recipe
from targetclip.world import load_scene, load_world
from train.encoder import (
    ENCODER,
    Config,
    directions_of,
    essence_loss,
    figures,
    make_parts,
    run,
    target_pictures,
    targets_of,
)
from train.loop import CHECKPOINT, LOG
from train.mapper_data import Validation


def configured(world: Path, out: Path, **changes: Any) -> Config:
    """A training that takes a second."""
    usual: dict[str, Any] = {
        "targets": ("styles:8@17", "avataaars:4@17"),
        "validation": ("avataaars:2@23", "styles:1@23"),
        "steps": 3,
        "batch_size": 2,
        "learning_rate": 0.05,
    }
    return Config(**{"out": out, "world": str(world), **usual, **changes})


@pytest.fixture
def small(tiny_world: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations."""
    return partial(configured, world=tiny_world, out=tmp_path / "out")


def state_of(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / CHECKPOINT, weights_only=True)
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def training_targets(specs: tuple[str, ...]) -> list[Target]:
    """Those of the train split, as they come."""
    found = [target for spec in specs for target in open_targets(spec)]
    return [t for t in found if isinstance(t, Target) and split_of(t.id) == "train"]


def lengthened(inverter: Inverter, path: Path) -> Inverter:
    """Another inverter of the same generator, with a mean w of its own, saved at `path`."""
    with torch.no_grad():
        for parameter in inverter.parameters():
            parameter.mul_(1.5)
        inverter.mean_w.fill_(0.25)
    save_inverter(inverter, path)
    return inverter


def test_the_default_targets_are_the_worlds_own(tiny_world: Path, tmp_path: Path) -> None:
    assert targets_of(Config(out=tmp_path, world=str(tiny_world))) == (
        ("generated:6000@17", "mixed:6000@17"),
        ("generated:32@23", "mixed:32@23"),
    )
    assert targets_of(Config(out=tmp_path)) == (
        ("avataaars:6000@17", "styles:6000@17"),
        ("avataaars:32@23", "styles:32@23"),
    )


# Directions


def test_a_direction_is_the_answer_less_the_mean(tiny_world: Path, tmp_path: Path) -> None:
    _, _, network = make_parts(configured(tiny_world, tmp_path))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = directions_of(network, images)
    torch.testing.assert_close(before, network(images) - network.mean_w)
    with torch.no_grad():
        network.mean_w.add_(5)
    torch.testing.assert_close(directions_of(network, images), before, atol=1e-5, rtol=0)


def test_the_loss_of_a_batch_falls(small: Callable[..., Config]) -> None:
    config = small(steps=25)
    scene, recipe, start = make_parts(config)
    _, pictures = target_pictures(config.out, targets_of(config)[0], scene, frozenset())

    def loss(network: Inverter) -> float:
        with torch.no_grad():
            losses = [essence_loss(network, scene, recipe, pictures[:4], i) for i in range(4)]
            return float(torch.stack(losses).mean())

    before = loss(start)
    after = loss(run(config))
    assert after < 0.95 * before


def test_the_loss_has_the_recipes_three_parts(small: Callable[..., Config]) -> None:
    config = small()
    scene, recipe, network = make_parts(config)
    pictures = target_pictures(config.out, targets_of(config)[0], scene, frozenset())[1][:2]
    nothing = {"transfer_weight": 0.0, "consistency_weight": 0.0, "weight_decay": 0.0}

    def loss(seed: int = 7, **weights: float) -> Tensor:
        weighed: Recipe = replace(recipe, **weights)  # type: ignore[arg-type]
        return essence_loss(network, scene, weighed, pictures, seed)

    parts = [loss(**{**nothing, name: getattr(recipe, name)}) for name in nothing]
    assert all(part.item() > 0 for part in parts)
    torch.testing.assert_close(loss(), torch.stack(parts).sum())
    for part in parts:
        network.zero_grad()
        part.backward()
        found = network.encoder.out.weight.grad
        assert found is not None and float(found.norm()) > 0
    assert loss().item() == loss().item() != loss(8).item()


# What a run starts from and leaves


def test_it_starts_from_the_worlds_inverter_or_from_the_one_given(
    small: Callable[..., Config], tiny_world: Path, tmp_path: Path
) -> None:
    inverter = load_scene(load_world(str(tiny_world))).inverter
    assert isinstance(inverter, Inverter)
    still: dict[str, Any] = {"steps": 1, "learning_rate": 1e-9}
    torch.testing.assert_close(run(small(**still)).state_dict(), inverter.state_dict())

    other = lengthened(inverter, tmp_path / "other.safetensors")
    started = run(small(start=tmp_path / "other.safetensors", out=tmp_path / "more", **still))
    expected = {name: value.half().float() for name, value in other.state_dict().items()}
    torch.testing.assert_close(started.state_dict(), expected)


def test_the_file_is_an_inverters_and_holds_the_average(
    small: Callable[..., Config], tiny_world: Path
) -> None:
    config = small()
    average = run(config)
    scene, _, _ = make_parts(config)
    loaded = load_inverter(config.out / ENCODER, scene.generator.fingerprint)
    for name, value in average.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name
    assert same(state_of(config.out)["average"], average.state_dict())
    assert not same(state_of(config.out)["network"], average.state_dict())


def test_the_log_tells_scores_on_targets_and_sources_that_are_held_out(
    small: Callable[..., Config],
) -> None:
    config = small(steps=4, evaluate_every=2)
    average = run(config)
    lines = [json.loads(line) for line in (config.out / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    scene, recipe, _ = make_parts(config)
    found = figures(average, Validation.open(config.validation, scene, recipe))
    assert {k: v for k, v in lines[1].items() if k not in ("step", "loss")} == found
    assert found.keys() == {
        "transfer_score",
        "transfer_score_in_range",
        "transfer_score_out_of_range",
        "consistency_score",
        "length",
    }
    # Two targets are in range, one is not
    inside, outside = found["transfer_score_in_range"], found["transfer_score_out_of_range"]
    assert found["transfer_score"] == pytest.approx((2 * inside + outside) / 3, abs=1e-6)
    one = figures(average, Validation.open(("avataaars:1@23",), scene, recipe))
    assert "transfer_score_out_of_range" not in one and one["length"] != found["length"]


class StopAt(Stop):
    """Asks to stop during some step."""

    def __init__(self, step: int) -> None:
        self.left = step
        super().__init__()

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        """Read once a picture or step."""
        return 15 if self.left == 0 else None

    @signal.setter
    def signal(self, number: int | None) -> None:
        pass

    def check(self) -> None:
        """Let the pictures be decoded."""


@pytest.mark.parametrize("max_images", [None, 3])
def test_a_run_that_ended_early_goes_on_as_if_nothing_had_been(
    max_images: int | None, small: Callable[..., Config], tmp_path: Path
) -> None:
    expected = run(small(out=tmp_path / "straight", max_images=max_images))
    config = small(max_images=max_images)
    with pytest.raises(Stopped):
        run(config, StopAt(0))
    assert state_of(config.out)["step"] == 1 and not (config.out / ENCODER).exists()
    with pytest.raises(ValueError, match=r"of other settings: learning_rate 0\.05 not 0\.04"):
        run(replace(config, learning_rate=0.04))
    with pytest.raises(ValueError, match="of other settings: targets pictures-"):
        run(replace(config, targets=("avataaars:7@17",)))
    assert same(run(config).state_dict(), expected.state_dict())


# What is trained on


def test_only_the_train_split_is_trained_on_and_decoded_once(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    scene, _, _ = make_parts(small())
    specs = ("avataaars:40@5", "styles:10@5")
    training = training_targets(specs)
    assert 0 < len(training) < 50
    left_out = frozenset({training[0].id})
    name, found = target_pictures(tmp_path, specs, scene, left_out)
    # At the generator's size, whatever that of the pictures
    assert found.shape == (len(training) - 1, 16, 16, 3) and found.dtype == np.uint8
    for target, picture in zip(training[1:], found, strict=True):
        expected = picture_to_tensor(target.picture, 16)[0].permute(1, 2, 0)
        assert np.array_equal(picture, ((expected + 1) * 127.5).round().to(torch.uint8).numpy())

    written = (tmp_path / name).stat()
    assert np.array_equal(target_pictures(tmp_path, specs, scene, left_out)[1], found)
    assert (tmp_path / name).stat() == written
    other, more = target_pictures(tmp_path, specs, scene, frozenset())  # other targets
    assert other != name and len(more) == len(training)


def test_folders_and_targets_to_validate_on_are_kept_apart(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    faces = builds_made.pictures(tmp_path / "faces")
    scene, _, _ = make_parts(small())
    _, found = target_pictures(tmp_path, (str(faces),), scene, frozenset())
    assert len(found) == len(training_targets((str(faces),))) > 0
    with pytest.raises(ValueError, match=r"--targets: expected pictures to train on.*held out"):
        run(small(targets=("avataaars:4@23",), validation=("avataaars:4@23",)))


def test_a_damaged_file_of_pictures_is_named(small: Callable[..., Config], tmp_path: Path) -> None:
    scene, _, _ = make_parts(small())
    target_pictures(tmp_path, ("avataaars:3@5",), scene, frozenset())
    [path] = tmp_path.glob("*.npy")
    for content in (b"", path.read_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}.*damaged.*delete it"):
            target_pictures(tmp_path, ("avataaars:3@5",), scene, frozenset())


# The command


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size: expected 1 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"targets": ()}, "--targets: expected some"),
        ({"validation": ()}, "--validation: expected pictures"),
        ({"targets": ("held-out:3",)}, "--targets: expected targets to learn from"),
        ({"validation": ("held-out:3",)}, "--validation: expected targets to learn from"),
        ({"start": Path("nowhere.safetensors")}, "no such inverter file"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line_and_an_exit_code(
    changes: dict[str, Any],
    message: str,
    small: Callable[..., Config],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert guarded(lambda: run(small(**changes)) and None, "train") == 1
    lines_of_error = capsys.readouterr().err.splitlines()
    errors = [line for line in lines_of_error if not line.startswith("loading world")]
    assert len(errors) == 1 and errors[0].startswith("train: error: ") and message in errors[0]


def test_a_world_without_an_inverter_needs_one_given(tiny_world: Path, tmp_path: Path) -> None:
    text = tiny_world.read_text().replace('inverter = "inverter.safetensors"', "")
    alone = tiny_world.with_name("alone.toml")
    alone.write_text(text)
    with pytest.raises(ValueError, match="--start: expected an inverter's file"):
        make_parts(configured(alone, tmp_path))
    start = tiny_world.with_name("inverter.safetensors")
    make_parts(configured(alone, tmp_path, start=start))
