"""The study of the trade-off: areas from points, and a small world from command to report."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.studies.tradeoff import BY_STRENGTH, TEACHER, Config, area, areas_of, run
from predictor.tradeoff import TradeoffConfig

ENDS = TradeoffConfig(identity_weights=(0.05, 1.0), decays=(1e-3, 3e-2))


def points(identity: list[list[float]], essence: list[list[float]]) -> dict[str, Any]:
    rows = zip(identity, essence, strict=True)
    return {f"keep {i}": {"identity": x, "essence": y} for i, (x, y) in enumerate(rows)}


def configured(world: Path, out: Path, *mappers: Path, **changes: Any) -> Config:
    small: dict[str, Any] = {
        "keeps": (0.0, 1.0),
        "strengths": (0.5, 1.0),
        "targets": 3,
        "teachers": 2,
        "sources": 2,
        "recipe": "identity",
        "max_steps": 1,
    }
    return Config(out=out, world=str(world), mapper=mappers, **{**small, **changes})


@pytest.fixture(scope="module")
def placed(write_mapper: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mapper(tmp_path_factory.mktemp("m") / "placed.safetensors", {}, tradeoff=ENDS)


@pytest.fixture(scope="module")
def plain(write_mapper: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mapper(tmp_path_factory.mktemp("m") / "plain.safetensors", {}, seed=1)


# Areas


def test_the_area_ends_at_the_unedited_source_and_counts_less_identity_as_well() -> None:
    # Constant 0.5 up to identity 0.6, then a line to (1, 0)
    assert area(np.array([0.6]), np.array([0.5])) == pytest.approx(0.6 * 0.5 + 0.4 * 0.5 / 2)
    assert area(np.array([1.0]), np.array([0.0])) == 0
    both = area(np.array([0.8, 0.2]), np.array([0.4, 0.8]))
    assert both == pytest.approx(0.2 * 0.8 + 0.6 * 0.6 + 0.2 * 0.2)
    # A point that another one beats in both changes nothing.
    beaten = area(np.array([0.2, 0.1, 0.8]), np.array([0.8, 0.3, 0.4]))
    assert beaten == pytest.approx(both, abs=1e-3)


def test_a_better_curve_has_the_larger_area_and_their_difference_is_paired() -> None:
    random = np.random.default_rng(0)
    hard = random.random(12)  # targets differ far more than curves do
    essence = np.stack([0.6 + hard, 0.3 + hard]) / 3
    worse = points([[0.3] * 12, [0.8] * 12], essence.tolist())
    better = points([[0.3] * 12, [0.8] * 12], (essence + 0.05).tolist())
    found = areas_of({"better": better, "worse": worse}, seed=0)
    assert found["areas"]["better"]["mean"] > found["areas"]["worse"]["mean"]
    apart = found["differences"]["better less worse"]
    alone = found["areas"]["worse"]
    assert 0 < apart["low"] <= apart["mean"] <= apart["high"] < 0.05
    assert apart["high"] - apart["low"] < 0.1 * (alone["high"] - alone["low"])
    assert areas_of({"better": better, "worse": worse}, seed=0) == found


def test_curves_of_other_numbers_of_targets_are_compared_on_those_of_both() -> None:
    many = points([[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]], [[0.6, 0.6, 0.0], [0.2, 0.2, 0.0]])
    few = points([[0.5, 0.5], [0.9, 0.9]], [[0.6, 0.6], [0.2, 0.2]])
    found = areas_of({"many": many, "few": few}, seed=0)
    assert found["differences"]["many less few"]["mean"] == pytest.approx(0)
    assert found["differences"]["many less few"]["count"] == 2
    assert found["areas"]["many"]["mean"] < found["areas"]["few"]["mean"]
    one = areas_of({"one": points([[0.5], [0.9]], [[0.6], [0.2]])}, seed=0)["areas"]["one"]
    assert one["low"] is None and one["count"] == 1


# The command


def test_mappers_and_the_teacher_are_drawn_along_the_trade_off(
    face_world: Path, placed: Path, plain: Path, tmp_path: Path
) -> None:
    config = configured(face_world, tmp_path, placed, plain)
    report = run(config)
    curves = report["curves"]
    labels = {name: list(points) for name, points in curves.items()}
    assert labels == {
        placed.name: ["keep 0", "keep 1"],
        placed.name + BY_STRENGTH: ["strength 0.5", "strength 1"],
        plain.name + BY_STRENGTH: ["strength 0.5", "strength 1"],
        TEACHER: ["keep 0", "keep 1"],
    }
    counts = {name: len(next(iter(points.values()))["essence"]) for name, points in curves.items()}
    assert counts == {**dict.fromkeys(labels, 3), TEACHER: 2}
    assert report["weights"][TEACHER]["keep 1"] == ["1.0000", "0.0300"]
    # Longer directions take more of the identity.
    for points in (curves[placed.name], dict(reversed(curves[plain.name + BY_STRENGTH].items()))):
        first, last = points.values()
        assert np.mean(first["identity"]) < np.mean(last["identity"])
    assert set(report["areas"]) == set(curves) and len(report["differences"]) == 6
    text = (tmp_path / "report.md").read_text()
    assert f"| {TEACHER} | keep 0 | 0.0500 | 0.0010 |" in text
    assert (tmp_path / "chart.png").is_file()


def test_what_is_there_is_not_made_again(
    face_world: Path, placed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(face_world, tmp_path, placed)
    whole, path = run(config), tmp_path / "report.json"
    text = path.read_text()
    report = json.loads(text)
    del report["curves"][TEACHER]["keep 1"], report["areas"], report["differences"]
    path.write_text(json.dumps(report))
    assert {*re.findall("teacher, keep [01]", capsys.readouterr().err)} == {
        "teacher, keep 0",
        "teacher, keep 1",
    }
    assert run(config) == whole and path.read_text() == text
    assert {*re.findall("teacher, keep [01]", capsys.readouterr().err)} == {"teacher, keep 1"}
    with pytest.raises(ValueError, match="is of another comparison"):
        run(configured(face_world, tmp_path, placed, sources=3))


def test_without_a_mapper_that_reads_it_there_is_no_teacher(
    face_world: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    curves = run(configured(face_world, tmp_path, plain))["curves"]
    assert list(curves) == [plain.name + BY_STRENGTH]
    assert "left out: the teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keeps": (0.5,)}, "expected two or more"),
        ({"keeps": (0.0, 1.5)}, "--keeps: expected a number from 0 to 1"),
        ({"strengths": (0.0, 1.0)}, "--strengths: expected numbers above 0"),
        ({"sources": 1}, "--sources: expected 2 or more"),
        ({"max_images": 0}, "--max-images: expected 1 or more"),
    ],
)
def test_options_without_sense_are_refused(
    changes: dict[str, Any], said: str, face_world: Path, placed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        run(configured(face_world, tmp_path / "out", placed, **changes))
    assert not (tmp_path / "out").exists()


def test_a_world_without_a_mapper_asks_for_one(face_world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--mapper: expected mapper files"):
        run(configured(face_world, tmp_path))
