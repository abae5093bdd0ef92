"""Calibrating a mapper of a tiny world, from the command to the file."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval import calibrate
from eval.calibrate import Config, run
from eval.expectation import fit_expectation
from predictor.gate import Gate
from predictor.load import load_essence
from predictor.mapper import load_mapper, save_mapper
from targetclip.recipes import RECIPES
from targetclip.world import load_world


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps everywhere, one rate."""
    monkeypatch.setattr(calibrate, "LENGTHS", (1, 2))
    monkeypatch.setattr(calibrate, "RATES", (0.01,))
    recipe = RECIPES["consistent"]
    quick = {**vars(recipe), "steps": 2, "sources": 2}
    monkeypatch.setitem(RECIPES, "consistent", type(recipe)(**quick))


def config_of(tiny_world: Path, mapper: Path, out: Path, **changes: object) -> Config:
    usual: dict[str, object] = {
        "targets": ("drawn:60@29", "generated:60@29"),
        "count": 2,
        "fitted": 6,
        "sources": 2,
        "probes": 2,
    }
    return Config(mapper=mapper, out=out, world=str(tiny_world), **{**usual, **changes})  # type: ignore[arg-type]


def test_the_file_written_passes_the_gate_and_is_the_same_mapper(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    before = tiny_mapper.read_bytes()
    config = config_of(tiny_world, tiny_mapper, tmp_path / "out")
    record = run(config)
    mapper, found = load_mapper(tmp_path / "out" / "mapper.safetensors")
    assert found == record and tiny_mapper.read_bytes() == before
    stretch, original = record.calibration["stretch"], load_mapper(tiny_mapper)[0]
    # What is fitted are the scores of the stretched directions.
    essence = load_essence(load_world(str(tiny_world)), torch.device("cpu"), tiny_mapper, 96)
    fitted = essence.asked_mapper()
    fitted.scale.mul_(stretch)
    fit_expectation(essence, fitted, config.targets, config.fitted, config.seed)
    assert mapper.fingerprint == fitted.fingerprint
    original.scale.mul_(stretch)
    heads = {"score.weight", "score.bias", "score_linear.weight"}
    was, now = original.state_dict(), mapper.state_dict()
    assert {name for name in now if not torch.equal(now[name], was[name])} == heads
    assert record.calibration["fitted"] == 12 and record.recipe["expects"] is True
    gate = Gate.of(mapper)
    assert gate.probes == 2 and gate.refine_steps in (1, 2) and gate.refine_rate == 0.01
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"] == record.calibration
    by_stretch = {float(factor): loss for factor, loss in report["loss_by_stretch"].items()}
    assert set(by_stretch) == set(calibrate.STRETCHES)
    assert by_stretch[stretch] == min(by_stretch.values())
    assert sum(report["each"]["mapper_loss"]) / 4 == pytest.approx(by_stretch[stretch], rel=1e-4)
    each = report["each"]
    assert each["set"] == ["drawn:60@29"] * 2 + ["generated:60@29"] * 2
    passing = [score >= gate.threshold for score in each["mapper_probe"]]
    assert report["passing"]["drawn:60@29"] == pytest.approx(sum(passing[:2]) / 2)
    losses = report["loss_by_rate_and_steps"]
    assert set(losses["loss"]["0.01"]) == {"0", "1", "2"}
    assert losses["loss"] == losses["teacher_loss"]  # of a mapper that was not taught identity
    assert (tmp_path / "out" / "reliability.png").is_file()


def test_a_mapper_taught_identity_is_calibrated_by_it_and_needs_the_model(
    tiny_world: Path, who_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    mapper, record = load_mapper(tiny_mapper)
    taught = {"recipe": {**vars(RECIPES["consistent"]), "identity_weight": 0.5}}
    path = tmp_path / "taught.safetensors"
    save_mapper(mapper, path, replace(record, recipe=taught))
    run(config_of(who_world, path, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["each"]["mapper_loss"] != report["each"]["mapper_teacher_loss"]
    assert set(report["loss_by_rate_and_steps"]) == {"loss", "teacher_loss"}
    with pytest.raises(ValueError, match="needs an identity model"):
        run(config_of(tiny_world, path, tmp_path / "without"))


def test_only_targets_of_the_validation_split_are_used(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    from data.targets import split_of

    run(config_of(tiny_world, tiny_mapper, tmp_path / "out", count=3))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {split_of(name) for name in report["each"]["id"]} == {"validation"}


def test_calibrating_twice_gives_the_same(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    records = [run(config_of(tiny_world, tiny_mapper, out, max_images=m)) for out, m in
               zip(outs, (96, 96), strict=True)]  # fmt: skip
    assert records[0] == records[1]


def test_the_expected_score_stays_as_training_left_it_if_asked(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    record = run(config_of(tiny_world, tiny_mapper, tmp_path / "out", fitted=0))
    found, original = load_mapper(tmp_path / "out" / "mapper.safetensors")[0], tiny_mapper
    was, now = load_mapper(original)[0].state_dict(), found.state_dict()
    for name in ("score.weight", "score.bias", "score_linear.weight"):
        assert torch.equal(now[name], was[name])
    assert record.calibration["fitted"] == 0 and "expects" not in record.recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("drawn:1@29",)}, "validation split"),
        ({"mapper": Path("none.safetensors")}, "no such mapper"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    changes: dict[str, object],
    words: str,
    tiny_world: Path,
    tiny_mapper: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"mapper": tiny_mapper, "targets": ("drawn:60@29",), **changes}
    arguments = ["--mapper", str(given["mapper"]), "--out", str(tmp_path / "out")]
    arguments += ["--world", str(tiny_world), "--targets", *given["targets"]]  # type: ignore[misc]
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments])
    with pytest.raises(SystemExit) as ended:
        calibrate.main()
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert ended.value.code == 1 and line.startswith("error: ") and words in line


def test_numbers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for changes in ({"count": 0}, {"sources": 1}, {"probes": 0}, {"fitted": -1}):
        with pytest.raises(ValueError, match=f"--{next(iter(changes))}"):
            Config(mapper=tmp_path, out=tmp_path, **changes)
    assert torch.is_grad_enabled()
