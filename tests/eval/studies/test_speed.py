"""Timing a tiny world: what is measured, and what the ratios are made of."""

import json
from pathlib import Path

import pytest

from eval.studies.speed import Config, ratios_of, run


def test_the_ratios_are_those_of_the_seconds() -> None:
    seconds = {"encoding": 2.0, "rendering": 3.0, "direction": 2.5, "edited image": 5.5}
    assert ratios_of({**seconds, "optimizer": 5000.0}) == {
        "direction to encoding": 1.25,
        "edited image to encoding and rendering": 1.1,
        "optimizer to direction": 2000.0,
    }


def test_everything_is_timed_and_reported(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    config = Config(
        out=tmp_path / "out", world=str(tiny_world), mapper=tiny_mapper, rounds=2, steps=3
    )
    report = run(config)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    seconds = report["seconds"]
    assert min(seconds.values()) > 0
    # 150 steps of the recipe, told from three
    assert seconds["optimizer"] > 10 * seconds["rendering"]
    assert report["ratios"] == ratios_of(seconds)


def test_a_world_without_a_mapper_has_no_speed(tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mapper"):
        run(Config(out=tmp_path / "out", world=str(tiny_world)))


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"steps": 0}])
def test_numbers_that_cannot_be_are_refused(changes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--{next(iter(changes))}"):
        run(Config(out=tmp_path, **changes))  # type: ignore[arg-type]
