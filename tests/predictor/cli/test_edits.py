"""Edits of the command by a mapper that reads its sources: corrected, scored, and left out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import report_of
from PIL import Image
from torch import Tensor

from predictor.direction import Direction, layer_weights
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.directions import load_direction
from targetclip.encoders.identity import identity_similarity
from targetclip.media.images import read_picture, tensor_to_pictures

Run = Callable[..., int]
INSTANT = ("--mode", "instant", "--num-sources", 3)


def with_mapper(world: Path, mapper: Path, name: str) -> Path:
    made = world.with_name(name)
    made.write_text(world.read_text() + f'mapper = "{mapper}"\nneutral = ["a face"]\n')
    return made


@pytest.fixture
def reading_world(who_world: Path, reading_mapper: Path) -> Path:
    """The tiny world with an identity model, and a mapper that reads its sources."""
    return with_mapper(who_world, reading_mapper, "reading.toml")


@pytest.fixture
def essence(reading_world: Path) -> EssenceTransfer:
    return load_essence(reading_world)


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("edited_*.png"))]


def expected(essence: EssenceTransfer, ws: Tensor, offsets: Tensor) -> list[np.ndarray]:
    return [np.asarray(p) for p in tensor_to_pictures(essence.scene.render(ws + offsets))]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    """Whether pictures are the same, but for rounding."""
    return len(found) == len(wanted) and all(
        np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(found, wanted, strict=True)
    )


def test_every_source_is_corrected_and_its_identity_is_reported(
    run: Run, tmp_path: Path, reading_world: Path, essence: EssenceTransfer, faces: list[Path]
) -> None:
    arguments = ("--world", reading_world, *INSTANT, "--max-images", 2, "--strength", 0.8)
    assert run("transfer", *arguments) == 0
    ws, direction = essence.scene.sources(3), essence.predict(read_picture(faces[0]))
    found = pictures(tmp_path / "out")
    assert same(found, expected(essence, ws, 0.8 * direction.offsets(ws)))
    assert not same(found, expected(essence, ws, 0.8 * direction.vector))
    report = report_of(tmp_path / "out")
    assert report["corrected"] is True
    model = essence.scene.identity
    assert model is not None
    before, after = (essence.edit(ws, direction, strength) for strength in (0.0, 0.8))
    kept = identity_similarity(model, before, after).tolist()
    assert report["scores"]["each"]["identity"] == pytest.approx(kept, abs=1e-4)
    assert report["scores"]["identity"] == pytest.approx(np.mean(kept), abs=1e-4)


def test_a_file_of_a_corrected_direction_serves_either_use(
    run: Run, tmp_path: Path, reading_world: Path, essence: EssenceTransfer, faces: list[Path]
) -> None:
    sources = ("--world", reading_world, "--num-sources", 3)
    assert run("transfer", "--world", reading_world, *INSTANT) == 0
    path = tmp_path / "out" / "direction.safetensors"
    for name, flags in {"applied": (), "alone": ("--one-direction",)}.items():
        out = ("--direction", path, "--out", tmp_path / name)
        assert run("transfer", *sources, *flags, *out) == 0
        assert report_of(tmp_path / name)["corrected"] is (name == "applied")
    assert same(pictures(tmp_path / "applied"), pictures(tmp_path / "out"))
    ws, direction = essence.scene.sources(3), essence.predict(read_picture(faces[0]))
    vector = load_direction(path, essence.scene.generator).direction  # as in the paper
    torch.testing.assert_close(vector, direction.vector)
    alone = pictures(tmp_path / "alone")
    assert same(alone, expected(essence, ws, vector))
    assert not same(alone, pictures(tmp_path / "out"))


@pytest.mark.parametrize("mode", ["instant", "auto"])
def test_one_direction_writes_what_a_mapper_without_a_correction_does(
    run: Run, tmp_path: Path, reading_world: Path, who_world: Path, tiny_mapper: Path, mode: str
) -> None:
    plain = with_mapper(who_world, tiny_mapper, "plain.toml")
    arguments = ("--mode", mode, "--num-sources", 2)
    assert run("transfer", *arguments, "--world", plain, "--out", tmp_path / "plain") == 0
    out = ("--world", reading_world, "--out", tmp_path / "alone")
    assert run("transfer", *arguments, "--one-direction", *out) == 0
    names = ["edited_000.png", "edited_001.png", "grid.png"]
    for name in names:
        content = [(tmp_path / folder / name).read_bytes() for folder in ("plain", "alone")]
        assert content[0] == content[1]
    report = report_of(tmp_path / "alone")
    assert report["corrected"] is False and report["one_direction"] is True
    assert "one_direction" not in report_of(tmp_path / "plain")


def test_a_place_on_the_trade_off_is_answered_and_named(
    run: Run,
    tmp_path: Path,
    who_world: Path,
    tradeoff_mapper: Path,
    tiny_mapper: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--world", with_mapper(who_world, tradeoff_mapper, "placed.toml"), *INSTANT)
    results = {}
    for name, asked in {"default": (), "most": ("--keep-identity", 0.9)}.items():
        assert run("transfer", *flags, *asked, "--out", tmp_path / name) == 0
        report = report_of(tmp_path / name)
        results[name] = report["keep_identity"], pictures(tmp_path / name)
        [row] = report["targets"]
        assert row["direction"]["keep_identity"] == report["keep_identity"]
    assert [results[name][0] for name in results] == [0.25, 0.9]
    assert not same(results["default"][1], results["most"][1])
    again = ("--direction", tmp_path / "most" / "direction.safetensors", "--num-sources", 3)
    assert run("transfer", *flags[:2], *again) == 0
    assert report_of(tmp_path / "out")["keep_identity"] == 0.9
    capsys.readouterr()
    world = with_mapper(who_world, tiny_mapper, "blind.toml")
    out = ("--keep-identity", 0.9, "--out", tmp_path / "none")
    assert run("transfer", "--world", world, *INSTANT, *out) == 1
    assert "reads no other" in capsys.readouterr().err
    assert not (tmp_path / "none" / "report.json").exists()


def test_where_there_is_no_correction_to_leave_out_a_warning_says_so(
    run: Run, tmp_path: Path, who_world: Path, tiny_mapper: Path, reading_world: Path
) -> None:
    plain = ("--world", with_mapper(who_world, tiny_mapper, "plain.toml"), "--one-direction")
    file = ("--direction", tmp_path / "out" / "direction.safetensors", "--num-sources", 1)
    for arguments, out in ((INSTANT, "out"), (file, "applied")):
        assert run("transfer", *plain, *arguments, "--out", tmp_path / out) == 0
        assert any("has no effect" in said for said in report_of(tmp_path / out)["warnings"])
    reading = ("--world", reading_world, *INSTANT, "--one-direction", "--out", tmp_path / "read")
    assert run("transfer", *reading) == 0
    assert not any("has no effect" in said for said in report_of(tmp_path / "read")["warnings"])


def test_mixtures_texts_layers_and_the_identity_floor_use_corrections(
    run: Run, tmp_path: Path, reading_world: Path, essence: EssenceTransfer, faces: list[Path]
) -> None:
    text = essence.only_named(essence.direction(text="green hair", mode="instant"))
    direction = essence.predict(read_picture(faces[0])) - 0.5 * text
    direction = direction.weighted(layer_weights(6, coarse=0, middle=0.5))
    ws, model = essence.scene.sources(3), essence.scene.identity
    assert model is not None
    before, after = (essence.edit(ws, direction, strength) for strength in (0.0, 1.0))
    floor = (1 + float(identity_similarity(model, before, after).mean())) / 2
    targets = ("--target", faces[0], "--text", "green hair", "--weights", 1, -0.5)
    edit = ("--coarse", 0, "--middle", 0.5, "--identity-floor", floor)
    assert run("transfer", "--world", reading_world, *INSTANT, *targets, *edit) == 0
    strength = essence.strength_at_identity(ws, direction, floor)
    report = report_of(tmp_path / "out")
    assert 0 < strength < 1 and report["strength"] == pytest.approx(strength)
    found = pictures(tmp_path / "out")
    assert same(found, expected(essence, ws, strength * direction.offsets(ws)))
    assert not same(found, expected(essence, ws, strength * direction.vector))


def test_in_a_mixture_each_target_has_factors_of_layers_of_its_own(
    run: Run,
    tmp_path: Path,
    reading_world: Path,
    essence: EssenceTransfer,
    faces: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = essence.only_named(essence.direction(text="green hair", mode="instant"))
    first = essence.predict(read_picture(faces[0])).weighted(layer_weights(6, coarse=0.5))
    direction = first + text.weighted(layer_weights(6, coarse=2))
    targets = ("--target", faces[0], "--text", "green hair", "--mix")
    flags = ("--world", reading_world, *INSTANT, *targets, "--coarse", 0.5, 2, "--middle", 0.5)
    assert run("transfer", *flags) == 0
    whole, ws = direction.weighted(layer_weights(6, middle=0.5)), essence.scene.sources(3)
    assert same(pictures(tmp_path / "out"), expected(essence, ws, whole.offsets(ws)))
    report = report_of(tmp_path / "out")
    assert report["middle"] == 0.5 and "coarse" not in report
    assert "coarse layers 0.5; green hair 1" in (tmp_path / "out" / "index.html").read_text()
    stored = load_direction(tmp_path / "out" / "direction.safetensors", essence.scene.generator)
    torch.testing.assert_close(stored.direction, direction.vector)
    assert [row["coarse"] for row in report["targets"]] == [0.5, 2]
    saved = ("--direction", tmp_path / "out" / "direction.safetensors", "--coarse", 0.5, 2)
    assert run("transfer", *flags[:2], *saved, "--num-sources", 2) == 1
    assert "--coarse: expected 1 factor, found 2" in capsys.readouterr().err


def test_the_probe_of_an_unchecked_answer_is_of_corrected_edits(
    run: Run, tmp_path: Path, reading_world: Path, essence: EssenceTransfer, faces: list[Path]
) -> None:
    assert run("transfer", "--world", reading_world, *INSTANT) == 0
    target = read_picture(faces[0])
    embedding, direction = essence.embed_target(target), essence.predict(target)
    probe = report_of(tmp_path / "out")["targets"][0]["direction"]["probe"]
    assert probe == pytest.approx(essence.probe_score(embedding, direction, 4), abs=1e-5)
    assert probe != pytest.approx(essence.probe_score(embedding, direction.vector, 4), abs=1e-3)


def test_all_frames_of_a_clip_have_the_correction_of_their_mean_latent(
    run: Run, tmp_path: Path, reading_world: Path, essence: EssenceTransfer, faces: list[Path]
) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, face in enumerate(faces * 2):
        read_picture(face).save(folder / f"{number}.png")
    clip = ("--clip", "--sources", folder, "--smooth", 1, "--max-images", 2)
    assert run("transfer", "--world", reading_world, "--mode", "instant", *clip) == 0
    ws = essence.scene.invert([read_picture(path) for path in sorted(folder.iterdir())])
    direction = essence.predict(read_picture(faces[0]))
    assert direction.correction is not None
    one = direction.vector + direction.correction(ws.mean(dim=0, keepdim=True))
    frames = sorted((tmp_path / "out" / "frames").iterdir())
    found = [np.asarray(Image.open(path)) for path in frames]
    assert same(found, expected(essence, ws, one))
    assert not same(found, expected(essence, ws, direction.offsets(ws)))


@pytest.mark.parametrize(
    "arguments", [("--mode", "refine"), ("--mode", "auto", "--steps", 2)], ids=["refine", "auto"]
)
def test_a_search_from_a_corrected_answer_writes_the_correction_with_its_direction(
    run: Run, tmp_path: Path, reading_world: Path, essence: EssenceTransfer, arguments: Any
) -> None:
    assert run("transfer", "--world", reading_world, *arguments, "--num-sources", 2) == 0
    found = Direction.load(tmp_path / "out" / "direction.safetensors", essence)
    assert (found.correction is not None) == (found.method in ("mapper", "refined"))
    ws = essence.scene.sources(2)
    assert same(pictures(tmp_path / "out"), expected(essence, ws, found.offsets(ws)))
