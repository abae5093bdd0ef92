"""The command line as people use it: what it writes, what it refuses, and Ctrl-C."""

import dataclasses
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import GROUPS, exit_code, one_line, report_of
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load

from data.illustrated.avatars import draw, render
from predictor.direction import Direction
from predictor.inputs import Text
from predictor.mapper import load_mapper, save_mapper
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.command import STOPPED
from targetclip.directions import direction_bytes, load_direction
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, save_identity
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.media.images import read_picture, tensor_to_pictures
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES
from targetclip.world import load_scene, load_world

ROOT = Path(__file__).parents[3]

Run = Callable[..., int]


def hashes(folder: Path) -> dict[str, str]:
    """What a folder holds, but for the report, which holds times, and the page: the command."""
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # whose metadata come in any order
            content = repr((load(content)["direction"].tolist(), metadata_of(path))).encode()
        if path.name not in ("report.json", "index.html"):
            found[path.name] = hashlib.sha256(content).hexdigest()
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(sorted(file.metadata().items()))


def test_transfer_writes_pictures_grid_direction_and_report(
    run: Run, tmp_path: Path, tiny_world: Path, faces: list[Path]
) -> None:
    assert run("transfer", "--num-sources", 4, "--seed", 7, "--strength", 1.5) == 0
    out = tmp_path / "out"
    edited = [f"edited_{i:03d}.png" for i in range(4)]
    expected = {"grid.png", "index.html", "direction.safetensors", "report.json", *edited}
    assert {path.name for path in out.iterdir()} == expected

    # The pictures are those of the direction in the file, on sources from the seed.
    scene = load_scene(load_world(str(tiny_world)))
    essence = EssenceTransfer(scene)
    stored = load_direction(out / "direction.safetensors", scene.generator)
    images = essence.edit(scene.sources(4, 7), stored.direction, 1.5)
    for name, picture in zip(edited, tensor_to_pictures(images), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(out / name)), np.asarray(picture))
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 5 * 128 and grid.height > 2 * 128

    report = report_of(out)
    assert (report["method"], report["recipe"], report["world"]) == (
        "optimizer", "consistent", "tiny",
    )  # fmt: skip
    assert report["settings"]["steps"] == report["steps"] == 3
    assert report["sources"] == {"count": 4, "seed": 7} and report["strength"] == 1.5
    assert report["target"] == str(faces[0]) and report["edited"] == edited
    assert report["interrupted"] is False and report["direction"] is None
    assert report["mode"] == "optimize"
    assert report["fingerprints"] == {
        "generator": scene.generator.fingerprint,
        "embedder": scene.embedder.fingerprint,
    }
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    phases = {"load", "sources", "direction", "edit", "score", "write"}
    assert report["seconds"].keys() == phases
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert report["direction_norm"] == pytest.approx(float(stored.direction.norm()))

    before = essence.edit(scene.sources(4, 7), stored.direction, 0.0)
    with Image.open(faces[0]) as target:
        scores = essence.score(target.convert("RGB"), before, images)
    assert report["scores"]["transfer"] == pytest.approx(float(scores.transfer))
    assert report["scores"]["consistency"] == pytest.approx(float(scores.consistency), abs=1e-5)
    for name in ("target_similarity_before", "target_similarity_after", "source_similarity_after"):
        each = report["scores"]["each"][name]
        assert len(each) == 4 and report["scores"][name] == pytest.approx(np.mean(each))
    torch.testing.assert_close(
        torch.tensor(report["scores"]["each"]["target_similarity_before"]), scores.target_before
    )


def test_source_pictures_are_inverted_and_edited(
    run: Run, tmp_path: Path, faces: list[Path], tiny_world: Path, direction_file: Path
) -> None:
    code = run("transfer", "--sources", faces[1], faces[2], "--direction", direction_file)
    assert code == 0
    scene = load_scene(load_world(str(tiny_world)))
    essence = EssenceTransfer(scene)
    pictures = [Image.open(path).convert("RGB") for path in faces[1:]]
    direction = load_direction(direction_file, scene.generator).direction
    images = essence.edit(scene.invert(pictures), direction)
    for name, picture in zip("ab", tensor_to_pictures(images), strict=True):
        found = np.asarray(Image.open(tmp_path / "out" / f"edited_{name}.png"))
        np.testing.assert_array_equal(found, np.asarray(picture))
    assert report_of(tmp_path / "out")["sources"] == [str(path) for path in faces[1:]]


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_latents_of_a_file_are_edited_and_results_have_their_numbers(
    run: Run, tmp_path: Path, tiny: EssenceTransfer, direction_file: Path, suffix: str
) -> None:
    ws, path = tiny.scene.sources(3, 5), tmp_path / f"latents{suffix}"
    if suffix == ".npy":
        np.save(path, ws.numpy())
    else:  # the release's nesting
        torch.save([row[None] for row in ws], path)
    flags = ("--direction", direction_file, "--strip")
    assert run("transfer", "--sources", path, *flags) == 0
    out = tmp_path / "out"
    direction = load_direction(direction_file, tiny.scene.generator).direction
    pictures = tensor_to_pictures(tiny.edit(ws, direction))
    for i, picture in enumerate(pictures):
        found = np.asarray(Image.open(out / f"edited_{i:03d}.png"))
        np.testing.assert_array_equal(found, np.asarray(picture))
    report = report_of(out)
    assert report["sources"] == {"count": 3, "file": str(path)}
    assert len(report["edited"]) == 3 and "align" not in report
    # Generated sources of that seed are the same latents.
    generated = ("--num-sources", 3, "--seed", 5, "--out", tmp_path / "generated")
    assert run("transfer", *generated, *flags) == 0
    same = ("grid.png", "strip.png", "edited_002.png")
    assert {hashes(out)[name] for name in same} <= {*hashes(tmp_path / "generated").values()}


class Code:
    """What a pickle runs when it is opened by a careless reader."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def test_latents_that_cannot_be_are_refused_in_one_line(
    run: Run, tmp_path: Path, faces: list[Path], unloadable_world: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    good = np.zeros((2, 6, 8), np.float32)
    np.save("wide.npy", np.zeros((2, 18, 512), np.float32))
    np.save("flat.npy", np.zeros(8, np.float32))
    np.save("whole.npy", good.astype(np.int64))
    np.save("nan.npy", good * np.nan)
    np.save("objects.npy", np.array([Code()]), allow_pickle=True)
    np.save("good.npy", good)
    torch.save(Code(), "code.pt")
    Path("damaged.npy").write_bytes(Path("good.npy").read_bytes()[:-9])
    cases: dict[str, str] = {
        "flat": "expected an array [num_ws, w_dim] or",
        "whole": "expected an array of floating-point numbers, found ndarray int64",
        "nan": "expected finite float32 numbers, found NaN",
        "objects": "read without running code",
        "code.pt": "read without running code",
        "damaged": "read without running code",
        "nowhere": "--sources: no latent file at 'nowhere.npy'",
    }
    for name, said in cases.items():
        path = name if "." in name else f"{name}.npy"
        # Before any network is loaded.
        assert run("transfer", "--sources", path, "--world", unloadable_world) == 1
        assert said in one_line(capsys.readouterr().err), name
    assert run("transfer", "--sources", "wide.npy") == 1
    assert "expected [6, 8], the generator's W+" in one_line(capsys.readouterr().err)
    for flags, said in (
        (("--sources", "good.npy", faces[0]), "one file of latents alone by --sources"),
        (("--sources", "good.npy", "--face", 1), "--face: no face is looked for here"),
        (("--sources", "good.npy", "--align"), "--align: no picture is inverted here"),
        (("--sources", "good.npy", "--clip"), "--clip: expected --sources with one folder"),
    ):
        assert run("transfer", *flags) == 1
        assert said in one_line(capsys.readouterr().err)
    assert not Path("ran").exists()  # no code of a file did


def test_a_direction_found_once_and_applied_gives_what_transfer_gives(
    run: Run, tmp_path: Path
) -> None:
    names = ("whole", "found", "applied")
    whole, found, applied = (tmp_path / name for name in names)
    sources = ("--num-sources", 2, "--seed", 4)
    assert run("transfer", *sources, "--out", whole) == 0
    assert run("optimize", "--seed", 4, "--out", found) == 0
    assert {path.name for path in found.iterdir()} == {"direction.safetensors", "report.json"}
    assert report_of(found)["scores_on_own_sources"].keys() == {"transfer", "consistency"}
    direction = found / "direction.safetensors"
    assert run("transfer", *sources, "--direction", direction, "--out", applied) == 0
    report = report_of(applied)
    assert (report["method"], report["recipe"]) == ("optimizer", "consistent")
    assert report["direction"] == str(direction)
    record = json.loads(metadata_of(direction)["record"])
    assert record["method"] == "optimizer" and record["seed"] == 4
    assert hashes(whole) == hashes(applied)
    assert hashes(whole)["direction.safetensors"] == hashes(found)["direction.safetensors"]


def test_a_direction_of_the_release_applies_as_ours_does(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    released, other = tmp_path / "joker.npy", tmp_path / "other.npy"
    np.save(released, load(direction_file.read_bytes())["direction"][None].numpy())
    np.save(other, np.zeros((1, 18, 512), np.float32))
    for path in (released, direction_file):
        out = tmp_path / path.suffix[1:]
        assert run("transfer", "--num-sources", 2, "--direction", path, "--out", out) == 0
    ours, theirs = hashes(tmp_path / "safetensors"), hashes(tmp_path / "npy")
    assert ours["edited_000.png"] == theirs["edited_000.png"]
    assert report_of(tmp_path / "npy")["method"] == "released"
    capsys.readouterr()
    assert run("transfer", "--direction", other) == 1
    assert "expected [6, 8], the generator's W+" in one_line(capsys.readouterr().err)


def test_a_record_cannot_pass_for_what_this_run_did(
    run: Run, tmp_path: Path, tiny_world: Path
) -> None:
    generator = load_scene(load_world(str(tiny_world))).generator
    path = tmp_path / "direction.safetensors"
    record = {"world": "elsewhere", "versions": {}, "interrupted": True, "scores": 1}
    path.write_bytes(direction_bytes(torch.zeros(6, 8), generator, record))
    assert run("transfer", "--num-sources", 2, "--direction", path) == 0
    report = report_of(tmp_path / "out")
    assert (report["method"], report["world"]) == ("file", "tiny")
    assert report["interrupted"] is False and report["versions"] and report["scores"] != 1


def test_strength_zero_changes_nothing_and_its_sign_matters(
    run: Run, tmp_path: Path, direction_file: Path
) -> None:
    for strength in ("0", "1", "-1"):
        arguments = ("--num-sources", 1, "--direction", direction_file, f"--strength={strength}")
        assert run("transfer", *arguments, "--out", tmp_path / strength) == 0
    scores = report_of(tmp_path / "0")["scores"]
    assert scores["target_similarity_before"] == scores["target_similarity_after"]
    assert scores["source_similarity_after"] == pytest.approx(1)
    pictures = {(tmp_path / strength / "edited_000.png").read_bytes() for strength in "01"}
    assert len(pictures | {(tmp_path / "-1" / "edited_000.png").read_bytes()}) == 3


def test_a_command_given_twice_writes_the_same_and_another_seed_does_not(
    run: Run, tmp_path: Path
) -> None:
    for name, seed in (("one", 1), ("again", 1), ("negative", -1)):
        code = run("transfer", "--num-sources", 2, "--seed", seed, "--out", tmp_path / name)
        assert code == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "again")
    assert not set(hashes(tmp_path / "one").values()) & set(hashes(tmp_path / "negative").values())


def test_the_recipe_and_its_changes_come_from_the_command_line(run: Run, tmp_path: Path) -> None:
    changes = ("--steps", 40, "--patience", 1, "--initial", "zero", "--max-images", 1)
    assert run("optimize", "--recipe", "paper", *changes, "--render-size", 8) == 0
    report = report_of(tmp_path / "out")
    assert report["recipe"] == "paper" and report["settings"]["differences"] == "raw"
    assert report["settings"]["initial"] == "zero" and report["settings"]["patience"] == 1
    assert report["settings"]["render_size"] == 8
    assert 1 <= report["steps"] < 40


def test_the_bar_tells_loss_and_time_left(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("optimize") == 0
    bar = capsys.readouterr().err
    assert re.search(r"loss=\d\.\d{4}", bar) and "3/3" in bar and re.search(r"\d<\d", bar)


def test_the_defaults_are_the_worlds_and_six_sources(
    run: Run, tmp_path: Path, tiny_world: Path, direction_file: Path
) -> None:
    world = tiny_world.with_name("strong.toml")
    world.write_text(tiny_world.read_text().replace("strength = 1.0", "strength = 0.25"))
    assert run("transfer", "--world", world, "--direction", direction_file) == 0
    report = report_of(tmp_path / "out")
    assert report["strength"] == 0.25 and report["sources"]["count"] == 6


# With a mapper, texts and several targets


def test_a_recipe_for_identity_is_refused_in_a_world_without_the_model(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("transfer", "optimize"):
        assert run(command, "--recipe", "identity") == 1
        told = one_line(capsys.readouterr().err)
        assert "--recipe: 'identity' has an identity loss, and world 'tiny' no identity" in told


def test_a_recipe_for_identity_is_the_optimizers_where_there_is_the_model(
    run: Run, tmp_path: Path, who_world: Path
) -> None:
    flags = ("--world", who_world, "--recipe", "identity", "--checkpoint-layers")
    assert run("transfer", *flags) == 0
    assert report_of(tmp_path / "out")["settings"]["identity_weight"] == 0.15


@pytest.fixture(scope="session")
def rich_world(
    tiny_world: Path, tiny_mapper: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny world with a mapper, neutral texts and an identity model."""
    identity = tmp_path_factory.mktemp("identity") / "identity.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_identity(AvatarIdentity(IdentityConfig(16, (8, 8), 8, 5)), identity)
    world = tiny_world.with_name("rich.toml")
    parts = f'mapper = "{tiny_mapper}"\nidentity = "{identity}"\nneutral = ["a face"]\n'
    world.write_text(tiny_world.read_text() + parts)
    return world


@pytest.fixture
def rich(rich_world: Path) -> EssenceTransfer:
    return load_essence(str(rich_world))


def test_an_instant_direction_is_the_mappers_and_says_so(
    run: Run,
    tmp_path: Path,
    rich_world: Path,
    rich: EssenceTransfer,
    faces: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", "--world", rich_world, "--mode", "instant", "--num-sources", 2) == 0
    captured = capsys.readouterr()
    assert "%" not in captured.err and "direction by mapper" in captured.out  # no bar: no search
    stored = load_direction(tmp_path / "out" / "direction.safetensors", rich.scene.generator)
    assert rich.mapper is not None
    assert stored.record == {
        "method": "mapper", "mode": "instant", "seed": 0, "steps": 0,
        "embedder": rich.scene.embedder.fingerprint, "mapper": rich.mapper.fingerprint,
    }  # fmt: skip
    predicted = rich.direction(read_picture(faces[0]), "instant")
    torch.testing.assert_close(stored.direction, predicted.vector)
    report = report_of(tmp_path / "out")
    assert report["method"] == "mapper" and report["mode"] == "instant"
    assert report["mapper"] == rich.mapper.fingerprint
    [target] = report["targets"]
    assert target["direction"]["expected"] == pytest.approx(predicted.expected)


def test_a_checked_direction_says_what_the_probes_said(
    run: Run, tmp_path: Path, rich_world: Path, rich: EssenceTransfer, faces: list[Path]
) -> None:
    arguments = ("--world", rich_world, "--mode", "auto", "--steps", 3, "--seed", 5)
    assert run("transfer", *arguments, "--num-sources", 1) == 0
    recipe = dataclasses.replace(RECIPES["consistent"], steps=3)
    expected = rich.direction(read_picture(faces[0]), "auto", recipe, seed=5)
    report = report_of(tmp_path / "out")
    assert (report["mode"], report["method"]) == ("auto", expected.method)
    assert report["steps"] == expected.steps and report["recipe"] == "consistent"
    assert report["targets"][0]["direction"]["probe"] == pytest.approx(expected.probe)
    assert rich.mapper is not None and report["mapper"] == rich.mapper.fingerprint


def test_several_targets_pictures_and_texts_are_mixed_by_their_weights(
    run: Run,
    tmp_path: Path,
    rich_world: Path,
    rich: EssenceTransfer,
    faces: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    targets = ("--target", faces[0], faces[1], "--text", "green hair")
    arguments = ("--world", rich_world, "--mode", "instant", "--num-sources", 2)
    assert run("transfer", *arguments, *targets, "--weights", 1, 0.5, "-0.25") == 0
    wanted = [read_picture(faces[0]), read_picture(faces[1]), Text("green hair")]
    parts = [rich.direction(target, "instant") for target in wanted]
    vectors = [part.vector for part in (*parts[:2], rich.only_named(parts[2]))]
    expected = vectors[0] + 0.5 * vectors[1] - 0.25 * vectors[2]
    stored = load_direction(tmp_path / "out" / "direction.safetensors", rich.scene.generator)
    torch.testing.assert_close(stored.direction, expected)

    report = report_of(tmp_path / "out")
    rows = report["targets"]
    assert [row["target"] for row in rows] == [str(faces[0]), str(faces[1]), "green hair"]
    assert [row["kind"] for row in rows] == ["picture", "picture", "text"]
    assert [row["weight"] for row in rows] == [1, 0.5, -0.25]
    assert all(row["direction"]["method"] == "mapper" for row in rows)
    ws = rich.scene.sources(2)
    before, after = rich.edit(ws, expected, 0.0), rich.edit(ws, expected)
    for row, target in zip(rows, wanted, strict=True):
        transfer = float(rich.score(target, before, after).transfer)
        assert row["scores"]["transfer"] == pytest.approx(transfer, abs=1e-5)
    assert "scores" not in report  # no target is the target
    out = capsys.readouterr().out
    assert out.count("transfer score") == 3 and "green hair: transfer score" in out
    with Image.open(tmp_path / "out" / "grid.png") as grid:  # targets, sources, results
        assert 3 * 256 < grid.height < 4 * 256


def test_a_text_alone_is_a_target(run: Run, tmp_path: Path, rich_world: Path) -> None:
    assert run("optimize", "--world", rich_world, "--text", "green hair") == 0
    report = report_of(tmp_path / "out")
    [target] = report["targets"]
    assert (target["target"], target["kind"], target["weight"]) == ("green hair", "text", 1)
    assert report["scores_on_own_sources"]["transfer"] == target["direction"]["transfer"]


def test_a_text_with_a_weight_brings_what_it_names_alone(
    run: Run, tmp_path: Path, rich_world: Path, rich: EssenceTransfer
) -> None:
    whole = rich.direction(text="green hair", mode="instant")
    for weights, expected in (((), whole), (("--weights", 1), rich.only_named(whole))):
        arguments = ("--world", rich_world, "--text", "green hair", "--num-sources", 1, *weights)
        assert run("transfer", *arguments, "--mode", "instant") == 0
        path = tmp_path / "out" / "direction.safetensors"
        stored = load_direction(path, rich.scene.generator)
        torch.testing.assert_close(stored.direction, expected.vector)
        assert ("targets" in stored.record) == bool(weights)
    assert not torch.allclose(whole.vector, expected.vector, atol=0.1)


def test_the_weight_of_an_only_target_counts(
    run: Run, tmp_path: Path, rich_world: Path, rich: EssenceTransfer
) -> None:
    vectors = []
    for weight in ("1", "-0.5"):
        arguments = ("--world", rich_world, "--mode", "instant", "--weights", weight)
        assert run("transfer", *arguments, "--num-sources", 1) == 0
        path = tmp_path / "out" / "direction.safetensors"
        vectors.append(load_direction(path, rich.scene.generator).direction)
    torch.testing.assert_close(vectors[1], -0.5 * vectors[0])


def test_layers_that_are_left_out_change_nothing(
    run: Run, tmp_path: Path, direction_file: Path
) -> None:
    changes: dict[str, tuple[object, ...]] = {
        "none": ("--strength", 0),
        "off": ("--coarse", 0, "--middle", 0, "--fine", 0),
        "coarse": ("--middle", 0, "--fine", 0),
        "all": (),
    }
    for name, arguments in changes.items():
        out = ("--num-sources", 1, "--direction", direction_file, "--out", tmp_path / name)
        assert run("transfer", *arguments, *out) == 0
    pictures = {name: (tmp_path / name / "edited_000.png").read_bytes() for name in changes}
    assert pictures["off"] == pictures["none"] and len({*pictures.values()}) == 3
    report = report_of(tmp_path / "off")
    assert report["coarse"] == report["middle"] == report["fine"] == 0
    assert report["scores"]["source_similarity_after"] == pytest.approx(1)
    # The direction itself stays whole.
    assert len({hashes(tmp_path / name)["direction.safetensors"] for name in changes}) == 1


def test_an_identity_floor_limits_the_strength(
    run: Run, tmp_path: Path, rich_world: Path, direction_file: Path
) -> None:
    strengths = []
    for floor in ("-1", "1"):
        arguments = ("--world", rich_world, "--direction", direction_file, "--strength", 2)
        assert run("transfer", *arguments, "--identity-floor", floor) == 0
        report = report_of(tmp_path / "out")
        assert report["identity_floor"] == float(floor)
        strengths.append(report["strength"])
    assert strengths[0] == 2 > 0.2 > strengths[1] >= 0


def test_a_world_without_mapper_says_so_once_and_optimizes(
    run: Run,
    tmp_path: Path,
    faces: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = dataclasses.replace(RECIPES["consistent"], steps=2)
    monkeypatch.setitem(RECIPES, "consistent", few)
    targets = ("--target", faces[0], faces[1])
    assert run("transfer", *targets, "--mix", "--num-sources", 1, steps=None) == 0
    captured = capsys.readouterr()
    assert captured.err.count("this world has no mapper") == 1
    assert "direction by optimizer" in captured.out
    report = report_of(tmp_path / "out")
    assert (report["mode"], report["steps"]) == ("optimize", 4) and "mapper" not in report


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "instant"], "--mode instant: world 'tiny' has no mapper"),
        (["--identity-floor", "0.5"], "--identity-floor: world 'tiny' has no identity model"),
        (["--text", "green hair"], "--text: world 'tiny' has no neutral texts"),
        (["--mapper", "nowhere.safetensors"], "--mapper: no mapper file at 'nowhere.safetensors'"),
    ],
)
def test_what_a_world_lacks_is_refused_in_one_line_before_any_search(
    run: Run,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", *arguments) == 1
    assert said in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_mapper_of_another_world_is_refused_in_one_line(
    run: Run, tmp_path: Path, tiny_mapper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapper, record = load_mapper(tiny_mapper)
    mapper.config = dataclasses.replace(mapper.config, generator="b" * 64)
    path = tmp_path / "other.safetensors"
    save_mapper(mapper, path, record)
    assert run("transfer", "--mapper", path) == 1
    line = one_line(capsys.readouterr().err)
    assert str(path) in line and "generator bbbbbbbbbbbb" in line


# Ctrl-C


def interrupt(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[list[Progress]], bool]
) -> list[Progress]:
    """Press Ctrl-C after the first step of which `when` holds; returns what steps will tell."""
    told: list[Progress] = []
    optimize = EssenceTransfer.optimize

    def interrupted(self: EssenceTransfer, *given: Any) -> Direction:
        *arguments, on_step = given

        def telling(progress: Progress) -> None:
            told.append(progress)
            on_step(progress)
            if when(told):
                raise KeyboardInterrupt

        return optimize(self, *arguments, telling)

    monkeypatch.setattr(EssenceTransfer, "optimize", interrupted)
    return told


def losses(told: list[Progress]) -> list[float]:
    return [float(progress.loss[0]) for progress in told]


@pytest.mark.parametrize("recipe", ["consistent", "release"])
def test_ctrl_c_leaves_the_direction_so_far(
    run: Run,
    tmp_path: Path,
    tiny_world: Path,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Stopped where the last step is not the best one: the release keeps the best, others the last.
    told = interrupt(monkeypatch, lambda told: losses(told)[-1] > min(losses(told)))
    assert run("optimize", "--recipe", recipe, "--steps", 200) == STOPPED == 130
    assert "interrupted" in capsys.readouterr().err
    last, best = told[-1], min(told, key=lambda progress: float(progress.loss[0]))
    kept = best if recipe == "release" else last
    generator = load_scene(load_world(str(tiny_world))).generator
    stored = load_direction(tmp_path / "out" / "direction.safetensors", generator)
    assert torch.equal(stored.direction, kept.directions[0])
    assert stored.record["steps"] == len(told) < 200 and stored.record["interrupted"] is True
    report = report_of(tmp_path / "out")
    assert report["interrupted"] is True
    scores = report["scores_on_own_sources"]
    assert scores["transfer"] == pytest.approx(1 - float(kept.transfer[0]))
    assert scores["consistency"] == pytest.approx(1 - float(kept.consistency[0]))
    assert not torch.equal(last.directions, best.directions)


def test_ctrl_c_in_a_transfer_still_shows_what_there_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, lambda told: True)
    assert run("transfer", "--num-sources", 1) == 130
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shown = {"edited_000.png", "grid.png", "index.html"}
    assert names == {"direction.safetensors", "report.json", *shown}
    assert "Warning: the run was stopped" in (tmp_path / "out" / "index.html").read_text("utf-8")


def test_ctrl_c_between_several_targets_leaves_no_half_a_mixture(
    run: Run, tmp_path: Path, faces: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, lambda told: len(told) == 4)  # in the second search
    assert run("transfer", "--mix", "--target", faces[0], faces[1]) == 130
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_before_the_first_step_ends_in_one_line(
    tiny_world: Path, faces: list[Path], tmp_path: Path
) -> None:
    # It comes while torch is imported.
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    common = ("--world", tiny_world, "--target", faces[0], "--out", tmp_path / "out")
    process = started("transfer", *common, PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == STOPPED and not out
    assert "stopped" in one_line(err) and not (tmp_path / "out").exists()


# Pictures


def awkward(kind: str, path: Path) -> None:
    """A picture of the kind, from a phone, a printer, a scanner or the web."""
    picture = Image.fromarray(render(draw("avataaars", {"seed": "1"})[0], 64))
    if kind == "cmyk":
        picture.convert("CMYK").save(path, "JPEG")
    elif kind == "16-bit":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path, "PNG")
    elif kind == "palette with alpha":
        picture.quantize(16).save(path, "PNG", transparency=bytes([0, 128] * 8))
    elif kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, "JPEG", exif=exif)
    elif kind == "animated":
        picture.save(path, "GIF", save_all=True, append_images=[picture.rotate(90)])
    elif kind == "one pixel":
        picture.resize((1, 1)).save(path, "PNG")
    else:
        picture.resize((300, 20)).save(path, "PNG")


@pytest.mark.parametrize(
    "kind",
    ["cmyk", "16-bit", "palette with alpha", "rotated", "animated", "one pixel", "very wide"],
)
def test_an_awkward_picture_is_taken_as_target_and_as_source(
    run: Run, tmp_path: Path, direction_file: Path, kind: str
) -> None:
    path = tmp_path / "picture"
    awkward(kind, path)
    arguments = ("--target", path, "--sources", path, "--direction", direction_file)
    assert run("transfer", *arguments) == 0
    assert (tmp_path / "out" / "edited_picture.png").is_file()


def spoilt(kind: str, path: Path) -> None:
    if kind == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "huge":
        Image.new("RGB", (9000, 1)).save(path, "PNG")
    elif kind == "no picture":
        path.write_text("a letter")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("place", ["--target", "--sources"])
@pytest.mark.parametrize("kind", ["missing", "cut", "huge", "no picture", "empty", "folder"])
def test_a_file_that_is_no_picture_is_refused_in_one_line(
    run: Run,
    tmp_path: Path,
    direction_file: Path,
    place: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "picture.png"
    spoilt(kind, path)
    assert run("transfer", place, path, "--direction", direction_file) == 1
    assert str(path) in one_line(capsys.readouterr().err)


# Everything else that can be wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strength", "nan"], "--strength"),
        (["--strength=-inf"], "--strength"),
        (["--strength", "1e30"], "--strength"),
        (["--strength", "much"], "--strength"),
        (["--steps", "0"], "--steps: expected 1 or more, found 0"),
        (["--steps", "-5"], "--steps"),
        (["--steps", "2.5"], "--steps"),
        (["--steps", "nan"], "--steps"),
        (["--patience", "0"], "--patience: expected 1 or more, found 0"),
        (
            ["--mode", "optimize", "--render-size", "9"],
            "--render-size: expected a size in px of [4",
        ),
        (["--max-images", "0"], "--max-images: expected 1 or more, found 0"),
        (["--max-images", "-1"], "--max-images"),
        (["--num-sources", "0"], "--num-sources: expected 1 to 1000, found 0"),
        (["--num-sources", "1000000000000"], "--num-sources"),
        (["--seed", "x"], "--seed"),
        (["--sources"], "--sources"),
        (["--sources", "a.png", "--num-sources", "2"], "exclude each other"),
        (["--recipe", "guess"], "release, paper, consistent, identity, found 'guess'"),
        (["--world", "guess"], "unknown world 'guess'"),
        (["--world", "guess.toml"], "guess.toml"),
        (["--mode", "guess"], "--mode"),
        (["--initial", "guess"], "--initial"),
        (["--device", "guess"], "--device"),
        (["--device", "meta"], "--device"),
        (["--guess"], "--guess"),
        (["--direction", "guess.safetensors"], "guess.safetensors"),
        (["--direction", "guess.safetensors", "--steps", "9"], "--steps is for finding"),
        (["--direction", "guess.safetensors", "--recipe", "paper"], "--recipe is for finding"),
    ],
)
def test_a_bad_option_is_refused_in_one_line_before_anything_is_written(
    run: Run,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", *arguments) in (1, 2)
    captured = capsys.readouterr()
    assert said in one_line(captured.err) and not captured.out
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("arguments", [[], ["guess"], ["transfer"], ["optimize", "--out", "x"]])
def test_an_unfinished_command_is_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    assert "--help" in one_line(capsys.readouterr().err)


def test_help_lists_the_options_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("transfer", "--help") == 0
    captured = capsys.readouterr()
    assert not captured.err
    fields = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    assert all(f"--{name.replace('_', '-')}" in captured.out for name in fields)
    assert all(f" {name} options " in captured.out for name in GROUPS)
    assert "(default: None)" not in captured.out and "(default: )" not in captured.out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_usage_error_is_one_line_on_terminals_with_and_without_frames(
    encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a" * 30
    with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding=encoding)):
        assert exit_code("optimize", "--initial", long, "--out", long) == 2
    line = one_line(capsys.readouterr().err)
    expected = f"--initial: expected inversion or random or zero, found '{long}'"
    assert line == f"targetclip: {expected} (see --help)"


def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(
    run: Run, tmp_path: Path, unloadable_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("precious")
    for out in (blocked, blocked / "folder"):
        assert run("transfer", "--world", unloadable_world, "--out", out) == 1
        assert f"--out: cannot write into {out}" in one_line(capsys.readouterr().err)
    assert blocked.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert run("transfer", "--out", tmp_path / "locked") == 1
    assert "Permission denied" in one_line(capsys.readouterr().err)


def test_a_direction_of_another_generator_is_refused_and_earlier_results_stay(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("transfer", "--num-sources", 1, "--direction", direction_file) == 0
    capsys.readouterr()
    earlier = hashes(tmp_path / "out")
    with torch.random.fork_rng(devices=[]):
        other = StyleGAN2(
            StyleGAN2Config(resolution=16, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8, 8))
        )
    path = tmp_path / "other.safetensors"
    path.write_bytes(direction_bytes(torch.zeros(6, 8), other, {}))
    assert run("transfer", "--direction", path) == 1
    assert other.fingerprint[:12] in one_line(capsys.readouterr().err)
    assert hashes(tmp_path / "out") == earlier


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("generator.safetensors", "nowhere.safetensors", "nowhere.safetensors"),
        ("generator.safetensors", "inverter.safetensors", "inverter.safetensors"),
        ("inverter.safetensors", "generator.safetensors", "targetclip-inverter/1"),
        ('embedder = "', 'embedder = "/nowhere', "no CLIP model"),
        ("consistent", "guess", "found 'guess'"),
        ("[", "[", "not a world file"),
    ],
)
def test_a_world_with_a_wrong_part_is_refused_in_one_line(
    run: Run, tiny_world: Path, old: str, new: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tiny_world.read_text()
    spoilt_text = text + "[" if old == new else text.replace(old, new)
    world = tiny_world.with_name("spoilt.toml")
    world.write_text(spoilt_text)
    assert run("transfer", "--world", world) == 1
    assert said in one_line(capsys.readouterr().err)


# As a program of its own


def started(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    def prepare() -> None:
        # Background jobs of a shell ignore Ctrl-C, those of nohup a hang-up, and hand that down.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "predictor.cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=prepare,
    )


def test_the_program_refuses_in_one_line_with_an_exit_code(tmp_path: Path) -> None:
    process = started("transfer", "--target", tmp_path / "nowhere.png", "--out", tmp_path / "out")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and not out
    assert "nowhere.png" in one_line(err) and not (tmp_path / "out").exists()


JOKER = "--target examples/joker.png"


CODES = {
    "--help": 0,
    "transfer --help": 0,
    "guess": 2,
    f"optimize {JOKER}": 2,
    f"transfer {JOKER} --out out --strength nan": 2,
    f"transfer {JOKER} --out out --recipe guess": 1,
    f"optimize {JOKER} --out out --world guess": 1,
    "transfer --target nowhere.png --out out": 1,
    "world list": 0,
}
ONE_AFTER_ANOTHER = """
import json, sys
from contextlib import redirect_stdout
from predictor import cli
found = {}
for line in json.loads(sys.argv[1]):
    with redirect_stdout(sys.stderr):
        try:
            cli.main(line.split())
        except SystemExit as ended:
            found[line] = ended.code or 0, "torch" in sys.modules
print(json.dumps(found))
"""


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    program = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps([*CODES])]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {line: [code, False] for line, code in CODES.items()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_program_with_the_direction_so_far(
    tiny_world: Path, faces: list[Path], tmp_path: Path, number: signal.Signals
) -> None:
    common = ("--world", tiny_world, "--target", faces[0], "--out", tmp_path)
    process = started("optimize", *common, "--steps", 1_000_000)
    assert process.stderr is not None
    shown = ""
    while "loss=" not in shown:  # steps are being taken
        part = process.stderr.read(1)
        assert part, shown
        shown += part
    process.send_signal(number)
    if number == signal.SIGHUP:  # a terminal that closes hears nothing more, and may send it twice
        process.send_signal(number)
        process.stderr.close()
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=120) == 130
    else:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130 and "Traceback" not in err
    report = report_of(tmp_path)
    assert report["interrupted"] is True and 1 <= report["steps"] < 1_000_000
    assert metadata_of(tmp_path / "direction.safetensors")["format"] == "targetclip-direction/1"


def test_pictures_that_cannot_be_written_leave_the_direction(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # less than a sheet
    try:
        assert run("transfer", "--num-sources", 1, steps=2) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "grid.png" in error and "free some space" in error
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"direction.safetensors", "edited_000.png", "report.json"}
    assert report_of(tmp_path / "out")["finished"] is False
