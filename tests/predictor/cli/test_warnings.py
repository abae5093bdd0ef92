"""Results that come with a warning: on standard error, and in report.json."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_runs import report_of
from PIL import Image

from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import MAPPING_LR_MULTIPLIER, StyleGAN2
from targetclip.world import load_scene, load_world

Run = Callable[..., int]


@pytest.fixture
def warned(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Run a transfer that succeeds; return its warnings, which are printed once and reported."""

    def transfer(*arguments: object) -> list[str]:
        assert run("transfer", *arguments) == 0
        printed = capsys.readouterr().err
        warnings: list[str] = report_of(tmp_path / "out")["warnings"]
        assert all(printed.count(f"targetclip: warning: {warning}\n") == 1 for warning in warnings)
        assert printed.count("warning:") == len(warnings)
        return warnings

    return transfer


Warned = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("flags", "strength"),
    [(("--strength", 100), 100), (("--strength=-8",), 8), (("--fine", 50), 50), ((), None),
     (("--strength", 3), None), (("--coarse", 0), None)],
)  # fmt: skip
def test_a_strength_far_beyond_the_usual_one(
    warned: Warned, direction_file: Path, flags: tuple[object, ...], strength: int | None
) -> None:
    warnings = warned("--num-sources", 1, "--direction", direction_file, *flags)
    said = [f"strength {strength} is far beyond the usual 1: pictures fall apart; "
            "give --strength of 3 at most"]  # fmt: skip
    assert warnings == ([] if strength is None else said)


def test_pictures_that_show_nothing(warned: Warned, tmp_path: Path, direction_file: Path) -> None:
    pixel, plain = tmp_path / "pixel.png", tmp_path / "plain.png"
    Image.new("RGB", (1, 1), "red").save(pixel)
    Image.new("RGB", (64, 64), "green").save(plain)
    warnings = warned("--target", pixel, "--sources", plain, "--direction", direction_file)
    assert warnings == [
        f"{pixel}: 1 x 1 px are too few to show a face; give 32 px a side or more",
        f"{plain}: the picture is of a single colour; check the file",
    ]


def test_an_identity_floor_says_what_it_chose_and_when_it_has_no_effect(
    warned: Warned, run: Run, who_world: Path, direction_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = ("--world", who_world, "--num-sources", 2, "--direction", direction_file)
    [none] = warned(*given, "--identity-floor", "-1")
    assert none.startswith("--identity-floor -1 has no effect")
    [all_of_it] = warned(*given, "--identity-floor", "1")
    assert "no strength above 0 keeps that; sources are unedited" in all_of_it
    assert run("transfer", *given, "--strength", 2, "--identity-floor", 0.999) == 0
    strength = report_of(tmp_path / "out")["strength"]
    assert f"strength {strength:.3g}, by --identity-floor 0.999" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mode", "few"), [("instant", ()), ("refine", ()), ("auto", ("--steps", 3))]
)
def test_a_target_out_of_place_by_the_mappers_calibration(
    warned: Warned, tiny_world: Path, tiny_mapper: Path, tmp_path: Path, faces: list[Path],
    mode: str, few: tuple[object, ...],
) -> None:  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    given = ("--mapper", tiny_mapper, "--mode", mode, *few, "--num-sources", 1)
    out_of_place = {}
    for name in (tmp_path / "noise.png", *faces):
        warnings = warned("--target", name, *given)
        direction = report_of(tmp_path / "out")["targets"][0]["direction"]
        out_of_place[name] = bool(warnings)
        assert bool(warnings) == (direction["probe"] < 0.5)
        for warning in warnings:
            assert f"its probe score is {direction['probe']:.2f}, and 0.50 or more" in warning
    if mode == "instant":
        assert any(out_of_place.values())


def test_a_latent_in_the_place_of_a_direction(
    warned: Warned, tiny_world: Path, tmp_path: Path
) -> None:
    generator = load_scene(load_world(str(tiny_world))).generator
    assert isinstance(generator, StyleGAN2)
    mapping = generator.mapping_network
    mapping.layers[-1].get_parameter("bias").fill_(4 / MAPPING_LR_MULTIPLIER)
    mapping.w_avg.fill_(4 * 2**0.5)
    save_safetensors(generator, tmp_path / "generator.safetensors")
    world, clip = tmp_path / "world.toml", load_world(str(tiny_world)).embedder
    world.write_text(
        f'name = "off"\ngenerator = "generator.safetensors"\nembedder = {json.dumps(clip)}\n'
    )
    one, other = load_scene(load_world(str(world))).sources(2)
    np.save(tmp_path / "me.npy", one.numpy())
    np.save(tmp_path / "offset.npy", (one - other).numpy())
    given = ("--world", world, "--num-sources", 1)
    [warning] = warned(*given, "--direction", tmp_path / "me.npy")
    assert "looks like a latent" in warning
    assert warned(*given, "--direction", tmp_path / "offset.npy") == []


def test_a_text_in_a_script_that_the_tokenizer_hardly_knows(
    warned: Warned, tiny_world: Path
) -> None:
    world = tiny_world.with_name("spoken.toml")
    world.write_text(tiny_world.read_text() + 'neutral = ["a face"]\n')
    assert warned("--world", world, "--num-sources", 1, "--text", "green hair") == []
    [warning] = warned("--world", world, "--num-sources", 1, "--text", "ተማሪ")
    assert "script" in warning and "ተማሪ" in warning
