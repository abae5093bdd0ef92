"""Costs of building pairs, at a size that takes seconds: what is measured, never how much."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from data.targets import Target
from eval.costs import peak_bytes
from eval.studies.scale import (
    MEASURES,
    RATES,
    Config,
    InstantScene,
    blank_targets,
    instant_build,
    measure_memory,
    measure_overhead,
    measure_plan,
    measure_throughput,
    memory_of,
    run,
)
from targetclip.recipes import RECIPES
from targetclip.world import load_scene, load_world


@pytest.fixture
def small(tiny_world: Path, tmp_path: Path) -> Config:
    out = tmp_path / "out"
    out.mkdir()
    return Config(out=out, world=str(tiny_world), targets=2, batch_size=2, steps=2, pairs=(2, 4))


def pairs_below(folder: Path) -> int:
    """Count the pairs of the dataset in a folder."""
    shards = folder.glob("*/dataset/data/*.parquet")
    return sum(pq.read_metadata(path).num_rows for path in shards)


# The measures


def test_the_overhead_is_what_a_build_takes_beyond_the_bare_optimizer(small: Config) -> None:
    figures = measure_overhead(small)
    assert figures["targets"] == 2 == pairs_below(small.out)
    seconds = [figures[f"{stage}_seconds"] for stage in ("plan", "run", "merge")]
    assert min(seconds) > 0 and figures["bare_seconds"] > 0
    bare, scoring = figures["bare_seconds"], figures["held_out_scoring_seconds"]
    assert figures["overhead"] == pytest.approx(sum(seconds) / bare - 1)
    less = (sum(seconds) - scoring) / bare - 1
    assert scoring > 0 and figures["overhead_without_scoring"] == pytest.approx(less)
    (path,) = small.out.glob("overhead-*/dataset/report.json")
    report = json.loads(path.read_text())
    assert report["settings"]["recipe"]["steps"] == 2 and report["settings"]["precision"] == "no"


@pytest.mark.parametrize("size", [2, 4])
def test_memory_is_that_of_a_build_of_the_size(size: int, small: Config) -> None:
    report = instant_build(small, size)
    assert sum(split["pairs"] for split in report["splits"].values()) == size
    before = peak_bytes() / 1e6
    assert memory_of(small, size) >= before > 10
    assert not list(small.out.glob("memory-*"))


def test_every_size_has_a_process_of_its_own(small: Config) -> None:
    calls: list[tuple[Any, ...]] = []

    def alone(function: Callable[..., float], *arguments: Any) -> float:
        calls.append((function, *arguments))
        return float(len(calls))

    assert measure_memory(small, alone) == {"2": 1.0, "4": 2.0}
    assert calls == [(memory_of, small, 2), (memory_of, small, 4)]


class Workers:
    """Stands in for builds in processes of their own: each publishes two chunks, at known times."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.commands: list[list[str]] = []

    def run(self, command: list[str], env: dict[str, str], check: bool) -> None:
        assert env["OMP_NUM_THREADS"] == "1" and check
        self.commands.append(command)

    def start(self, command: list[str], env: dict[str, str]) -> SimpleNamespace:
        self.run(command, env, True)
        chunks = Path(command[command.index("--out") + 1]) / ".build" / "chunks"
        chunks.mkdir(parents=True, exist_ok=True)
        begun = len(list(chunks.iterdir()))
        for number, time in ((begun, 1000 + begun), (begun + 1, 1010)):
            path = chunks / f"{number:05}.parquet"
            path.touch()
            os.utime(path, (time, time))
        return SimpleNamespace(wait=lambda: self.code)


def test_throughput_is_the_rate_from_the_first_chunk_to_the_last(small: Config) -> None:
    workers = Workers()
    rates = measure_throughput(small, workers.run, workers.start)
    # A chunk of two targets in ten seconds, and two of them by two processes
    expected = {"targets_per_second_1": 0.2, "targets_per_second_2": 0.4, "ratio": 2.0}
    assert rates == pytest.approx(expected)
    plans = [command for command in workers.commands if command[-1] == "plan"]
    runs = [command for command in workers.commands if command[-1] == "run"]
    assert [("avataaars:2" in plan, "avataaars:4" in plan) for plan in plans] == [(1, 0), (0, 1)]
    assert len(runs) == 3 and all("--steps" in command for command in workers.commands)


def test_a_worker_that_fails_gives_no_throughput(small: Config) -> None:
    workers = Workers(code=1)
    with pytest.raises(OSError, match=r"a worker of .* failed"):
        measure_throughput(small, workers.run, workers.start)


def test_the_plan_is_operations_by_images_over_each_rate(small: Config) -> None:
    report = measure_plan(small, lambda sizes: sizes.resolution * 10**9)
    assert report.keys() == {"256", "1024"}
    for resolution, rows in report.items():
        images = {
            name: 1e6 * recipe.sources * recipe.steps
            for name, recipe in RECIPES.items()
            if not recipe.identity_weight
        }
        images["mapper"] = 4500 * 96
        assert rows.keys() == images.keys()
        for name, row in rows.items():
            assert row["petaflop"] == pytest.approx(images[name] * int(resolution) / 1e6)
            for rate in RATES:
                hours = 1000 * row["petaflop"] / rate / 3600
                assert row["hours"][str(rate)] == pytest.approx(hours)
                assert row["dollars"][str(rate)] == pytest.approx(2.5 * hours)
                assert row["spot_dollars"][str(rate)] == pytest.approx(1.25 * hours)


# The report


class Numbers:
    """Stands in for all measures: each gives the number of measures taken so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.measures = {name: self.measure(name) for name in MEASURES}

    def measure(self, name: str) -> Callable[[Config], dict[str, Any]]:
        def counted(config: Config) -> dict[str, Any]:
            self.names.append(name)
            return {"value": len(self.names)}

        return counted


def test_without_only_everything_is_measured(
    small: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = Numbers()
    report = run(small, numbers.measures)
    assert numbers.names == ["overhead", "throughput", "memory", "plan"] == list(report)
    assert json.loads((small.out / "report.json").read_text()) == report
    assert all(row["machine"]["threads"] >= 1 for row in report.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in report)


def test_only_one_is_measured_and_the_rest_of_the_report_stays(small: Config) -> None:
    numbers = Numbers()
    first = run(small, numbers.measures)
    again = run(Config(out=small.out, only="memory"), numbers.measures)
    assert numbers.names[4:] == ["memory"]
    assert again["memory"]["value"] == 5
    assert {k: v for k, v in again.items() if k != "memory"} == {
        k: v for k, v in first.items() if k != "memory"
    }
    assert json.loads((small.out / "report.json").read_text()) == again


# Stand-ins


def test_the_simulated_optimizer_depends_on_its_seeds_alone(tiny_world: Path) -> None:
    scene = InstantScene(**vars(load_scene(load_world(str(tiny_world)), torch.device("cpu"))))
    recipe = RECIPES["consistent"]

    def search(seed: int) -> Any:
        seeds = [seed, seed + 1, seed + 2]
        return scene.search(torch.zeros(3, 32), recipe, torch.zeros(3, 6, 8), seeds)

    first = search(1)
    assert first.directions.shape == (3, 6, 8) and first.failures == (None,) * 3
    assert torch.equal(first.directions, search(1).directions)
    assert not torch.equal(first.directions, search(2).directions)
    assert first.steps.tolist() == [recipe.steps] * 3


def test_numbered_targets_are_blank_and_each_has_its_own_id() -> None:
    blank = blank_targets(5)
    assert len(blank) == 5
    targets = [target for target in blank if isinstance(target, Target)]
    assert len({target.id for target in targets}) == 5
    assert not any(np.asarray(target.picture).any() for target in targets)
    rest = [target for target in blank.starting_at(3) if isinstance(target, Target)]
    assert [target.id for target in rest] == [target.id for target in targets[3:]]
    assert blank_targets(6).identity() != blank.identity()
