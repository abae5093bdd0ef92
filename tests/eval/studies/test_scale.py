"""What building pairs costs, at a size that takes seconds: what is measured, never how much."""

import json
import os
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch

from data.build import Config as Build
from data.targets import Target, TargetSet
from eval.studies import scale
from eval.studies.scale import (
    MEASURES,
    PEAK,
    Config,
    NumberedTargets,
    measure_overhead,
    measure_throughput,
    memory_of,
    peak_megabytes,
    run,
    simulated,
)
from targetclip.recipes import RECIPES


@pytest.fixture(autouse=True)
def in_the_tiny_world(tiny_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds that are measured are of the tiny world, and not of the bundled one."""
    monkeypatch.setattr(scale, "Build", partial(Build, world=str(tiny_world)))


@pytest.fixture
def small(tmp_path: Path) -> Config:
    return Config(out=tmp_path / "out", targets=2, batch_size=2, steps=2, pairs=(2, 4))


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs in each dataset that is merged from here on."""
    counts: list[int] = []
    merge = scale.merge

    def counted(chunks: list[Path], out: Path, *arguments: Any) -> Any:
        report = merge(chunks, out, *arguments)
        counts.append(sum(pq.read_metadata(path).num_rows for path in out.rglob("*.parquet")))
        return report

    monkeypatch.setattr(scale, "merge", counted)
    return counts


# The measures


def test_the_overhead_is_what_a_build_takes_beyond_the_bare_optimizer(
    small: Config, merged: list[int]
) -> None:
    found = measure_overhead(small)
    assert found["targets"] == 2 and merged == [2]
    seconds = [found[f"{stage}_seconds"] for stage in ("plan", "run", "merge")]
    assert min(seconds) > 0 and found["bare_seconds"] > 0
    bare, scoring = found["bare_seconds"], found["held_out_scoring_seconds"]
    assert found["overhead"] == pytest.approx(sum(seconds) / bare - 1)
    less = (sum(seconds) - scoring) / bare - 1
    assert scoring > 0 and found["overhead_without_scoring"] == pytest.approx(less)


def test_the_steps_asked_for_are_those_of_the_bare_optimizer_too(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    optimize_chunk = scale.Teacher.optimize_chunk

    def counted(teacher: Any, *arguments: Any) -> Any:
        taken.append(teacher.recipe.steps)
        return optimize_chunk(teacher, *arguments)

    monkeypatch.setattr(scale.Teacher, "optimize_chunk", counted)
    measure_overhead(small)
    assert taken == [2, 2]  # once in the build, once bare


@pytest.mark.parametrize("size", [2, 4])
def test_memory_is_that_of_a_build_of_the_size(
    size: int, small: Config, merged: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.worker.optimize_directions", None)  # simulated instead
    before = peak_megabytes()
    assert memory_of(small, size) >= before > 10
    assert merged == [size]
    assert not list((small.out / "memory").glob("work-*"))


def test_every_size_has_a_process_of_its_own(
    small: Config, monkeypatch: pytest.MonkeyPatch, merged: list[int]
) -> None:
    asked: list[tuple[str, int]] = []

    def context(method: str) -> SimpleNamespace:
        def pool(processes: int) -> ThreadPool:
            asked.append((method, processes))
            return ThreadPool(processes)

        return SimpleNamespace(Pool=pool)

    monkeypatch.setattr(scale.multiprocessing, "get_context", context)
    report = run(Config(out=small.out, only="memory", pairs=small.pairs))
    assert asked == [("spawn", 1), ("spawn", 1)] and merged == [2, 4]
    assert report["memory"].keys() == {"2", "4", "machine"}


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


def test_throughput_is_the_rate_from_the_first_chunk_to_the_last(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers()
    monkeypatch.setattr(scale.subprocess, "run", workers.run)
    monkeypatch.setattr(scale.subprocess, "Popen", workers.start)
    found = measure_throughput(small)
    # A chunk of two targets in ten seconds, and two of them by two processes
    expected = {"targets_per_second_1": 0.2, "targets_per_second_2": 0.4, "ratio": 2.0}
    assert found == pytest.approx(expected)
    plans = [command for command in workers.commands if command[-1] == "plan"]
    runs = [command for command in workers.commands if command[-1] == "run"]
    assert [("drawn:2" in plan, "drawn:4" in plan) for plan in plans] == [(1, 0), (0, 1)]
    assert len(runs) == 3 and all("--steps" in command for command in workers.commands)


def test_a_worker_that_fails_gives_no_throughput(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(code=1)
    monkeypatch.setattr(scale.subprocess, "run", workers.run)
    monkeypatch.setattr(scale.subprocess, "Popen", workers.start)
    with pytest.raises(RuntimeError, match=r"a worker of .* failed"):
        measure_throughput(small)


def test_the_plan_is_operations_by_steps_over_the_rate_assumed(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "count_operations", lambda sizes: sizes.sources * 10**12)
    found = run(Config(out=small.out, only="plan"))["plan"]
    counted = {name: recipe for name, recipe in RECIPES.items() if not recipe.identity_weight}
    assert found.keys() == counted.keys() | {"assumed_fraction", "assumed_price", "machine"}
    for name, recipe in counted.items():
        row = found[name]
        assert row["steps"] == recipe.steps
        assert row["petaflop_a_pair"] == pytest.approx(recipe.sources * recipe.steps / 1000)
        for device, peak in PEAK.items():
            seconds = 1e6 * 1e15 * row["petaflop_a_pair"] / (found["assumed_fraction"] * peak)
            hours = row[f"hours for a million, {device}"]
            assert hours == pytest.approx(seconds / 3600)
            dollars = row[f"dollars for a million, {device}"]
            assert dollars == pytest.approx(hours * found["assumed_price"])


# The report


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measures taken from here on, by their names; none takes time."""
    names: list[str] = []

    def stand_in(name: str) -> Callable[[Config], dict[str, Any]]:
        def measure(config: Config) -> dict[str, Any]:
            names.append(name)
            return {"value": len(names)}

        return measure

    for name in list(MEASURES):
        monkeypatch.setitem(MEASURES, name, stand_in(name))
    return names


def test_without_only_everything_is_measured(
    small: Config, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(small)
    assert measured == ["overhead", "throughput", "memory", "plan"] == list(report)
    assert json.loads((small.out / "report.json").read_text()) == report
    assert all(found["machine"]["threads"] >= 1 for found in report.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in report)


def test_only_one_is_measured_and_the_rest_of_the_report_stays(
    small: Config, measured: list[str]
) -> None:
    first = run(small)
    again = run(Config(out=small.out, only="memory"))
    assert measured[4:] == ["memory"]
    assert again["memory"]["value"] == 5
    assert {k: v for k, v in again.items() if k != "memory"} == {
        k: v for k, v in first.items() if k != "memory"
    }
    assert json.loads((small.out / "report.json").read_text()) == again


# Stand-ins


def test_the_simulated_optimizer_depends_on_its_seeds_alone() -> None:
    def found(seed: int) -> Any:
        initial = torch.zeros(3, 6, 8)
        embeddings, bank = torch.zeros(3, 32), torch.zeros(6, 6, 8)
        seeds = [seed, seed + 1, seed + 2]
        recipe = RECIPES["consistent"]
        return simulated(None, None, embeddings, bank, recipe, initial, seeds, max_images=1)

    first = found(1)
    assert first.directions.shape == (3, 6, 8) and first.failures == (None,) * 3
    assert torch.equal(first.directions, found(1).directions)
    assert not torch.equal(first.directions, found(2).directions)
    assert first.steps.tolist() == [RECIPES["consistent"].steps] * 3


def test_numbered_targets_are_blank_and_each_has_its_own_id() -> None:
    blank = NumberedTargets(5)
    assert isinstance(blank, TargetSet) and len(blank) == 5
    found = [target for target in blank if isinstance(target, Target)]
    assert len({target.id for target in found}) == 5
    assert not any(np.asarray(target.picture).any() for target in found)
    rest = [target for target in blank.starting_at(3) if isinstance(target, Target)]
    assert [target.id for target in rest] == [target.id for target in found[3:]]
    assert NumberedTargets(6).identity() != blank.identity()
