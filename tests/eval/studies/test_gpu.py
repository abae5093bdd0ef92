"""The study of an accelerator at sizes that take seconds: what it reports, never how fast it is."""

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.bench import EAGER, ENLARGE, LAYOUT, TINY, Bench, beside_another
from eval.costs import CPU, NOT_MEASURED, random_networks
from eval.sizes import Sizes
from eval.studies.gpu import Config, Study, run
from targetclip.generators.stylegan2 import blur_kernel, enlarged
from targetclip.recipes import RECIPES

PARTS = {"ceilings", "parity", "steps", "ms of a step", "edits", "answers", "training", "pairs"}


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(clip_dir: Path) -> Iterator[dict[int, Sizes]]:
    """Give the study's small sizes, which it yields, a smaller CLIP than the world's."""
    given = dict(TINY)
    with pytest.MonkeyPatch.context() as patch:
        for size, sizes in given.items():
            patch.setitem(TINY, size, replace(sizes, clip=f"local-dir:{clip_dir}"))
        yield given


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY[16], CPU, 0.0)


def test_the_small_sizes_are_of_networks_that_are_there(tiny_clip: dict[int, Sizes]) -> None:
    for size, sizes in tiny_clip.items():
        assert random_networks(sizes)[0].resolution == size


def test_every_row_is_in_the_report_and_what_time_was_not_left_for_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def clock() -> float:
        """No time passes until networks would be compiled or processes started; then all is."""
        path = tmp_path / "report.json"
        rows = json.loads(path.read_text())["pairs"] if path.exists() else {}
        return 0.0 if rows.get("32 px, 4 targets at once", NOT_MEASURED) == NOT_MEASURED else 1e6

    report = run(Config(out=tmp_path, device="cpu"), clock)
    assert report.keys() == {"machine", *PARTS}
    rows = {(part, row): value for part in PARTS for row, value in report[part].items()}
    measured = {row for row, value in rows.items() if isinstance(value, dict)}
    others = [value for row, value in rows.items() if row not in measured]
    assert len(measured) > 20 and all(value.startswith(NOT_MEASURED) for value in others)
    assert "no time was left" in report["steps"]["release 16 px, best together, compiled"]
    search = report["steps"]["release 16 px"]
    assert search["steps/s"] > 0 and search["of bf16 peak"] > 0
    assert search["of copied GB/s"] > 0
    assert "TFLOP/s" not in report["steps"]["release 32 px, early exit"]  # of another size
    convolutions = report["ceilings"]["convolutions of 32 px, bf16"]
    assert convolutions["best TFLOP/s"] > 0 and convolutions["least ms of a step by memory"] > 0
    assert report["parity"]["fp32 without TF32"]["directions"] == 0
    assert 0 < report["parity"]["bf16"]["directions"] < 0.2
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.md").read_text()
    assert all(row in page for _, row in rows) and page in capsys.readouterr().out


def test_without_time_nothing_is_measured_and_the_pages_are_written(tmp_path: Path) -> None:
    report = run(Config(out=tmp_path, minutes=1e-6, device="cpu"))
    assert all(v.startswith(NOT_MEASURED) for part in PARTS for v in report[part].values())
    assert (tmp_path / "report.md").is_file()


def test_a_measurement_that_fails_or_lasts_leaves_its_reason(tmp_path: Path) -> None:
    study = Study(Config(out=tmp_path, minutes=1), CPU)

    def fail() -> dict[str, float]:
        raise torch.OutOfMemoryError("too\nmuch")

    def last() -> dict[str, float]:
        while True:
            pass

    assert study.take(1, fail) == f"{NOT_MEASURED}: OutOfMemoryError: too much"
    assert "Expired: took longer" in study.take(0.05, last)


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--minutes"):
        run(Config(out=tmp_path, minutes=0))


@pytest.mark.parametrize("lever", ENLARGE)
def test_every_way_to_enlarge_gives_the_same_maps(lever: str) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 5, generator=random, dtype=torch.float64)
    weight = torch.randn(7, 6, 3, 3, generator=random, dtype=torch.float64)
    blur = blur_kernel(4.0).double()
    torch.testing.assert_close(ENLARGE[lever](x, weight, blur), enlarged(x, weight, blur))


def test_levers_change_how_networks_compute_and_not_what(bench: Bench) -> None:
    other = bench.pull([LAYOUT, "sums", EAGER])
    image, images = other.scene.render(other.bank[:1]), bench.scene.render(bench.bank[:1])
    torch.testing.assert_close(image, images, rtol=1e-4, atol=1e-4)
    assert not other.scene.graphs and bench.scene.graphs
    assert not bench.scene.generator.convs[1].enlarge  # type: ignore[attr-defined]


def test_a_process_beside_another_answers_seconds_or_an_error() -> None:
    answers: queue.Queue[float | str] = queue.Queue()
    ready = threading.Barrier(1)
    beside_another(TINY[16], "cpu", 0.0, 1, ready, answers)
    beside_another(replace(TINY[16], clip="ViT-B-33"), "cpu", 0.0, 1, ready, answers)
    seconds, error = answers.get(), answers.get()
    assert isinstance(seconds, float) and seconds > 0
    assert isinstance(error, str) and "ViT-B-33" in error


def test_steps_of_a_search_are_timed_after_the_first(bench: Bench) -> None:
    assert len(bench.steps(RECIPES["consistent"])) == 3
    assert RECIPES["consistent"].steps > 10
