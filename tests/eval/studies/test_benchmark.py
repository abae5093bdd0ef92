"""The benchmark at a size that takes a second: what it counts and reports, never how fast it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eval.costs import (
    Convolutions,
    convolution_rate,
    count_operations,
    least_bytes,
    random_networks,
    take_shapes_through,
)
from eval.studies.benchmark import Config, GroupedConv, report_table, run, timing_of


@pytest.fixture
def tiny(clip_dir: Path) -> Config:
    return Config(
        steps=2,
        sources=2,
        resolution=32,
        channels=(8, 8, 6, 4),
        w_dim=8,
        mapping_layers=1,
        clip=f"local-dir:{clip_dir}",
        matrix_sizes=(32, 64),
        copied_numbers=2**10,
    )


def test_the_report_says_how_fast_each_precision_was(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(dataclasses.replace(tiny, out=tmp_path / "new"))
    assert [timing["precision"] for timing in report["runs"]] == ["fp32", "bf16"]
    for timing in report["runs"]:
        assert len(timing["seconds"]) == tiny.steps
        assert min(timing["seconds"]) > 0
        median = sum(timing["seconds"]) / 2
        assert timing["steps_per_second"] == pytest.approx(1 / median)
        assert timing["gflops"] == pytest.approx(report["gflop_per_step"] / median)
        best = max(timing["matrix_gflops"], timing["convolution_gflops"])
        assert timing["fraction"] == pytest.approx(timing["gflops"] / best)
        floors = timing["floor_seconds"]
        assert floors["operations"] == pytest.approx(report["gflop_per_step"] / best)
        moved = timing["least_gigabytes"] / report["copied_gigabytes_per_second"]
        assert floors["memory"] == pytest.approx(moved)
        assert floors[timing["limit"]] == max(floors.values())
        assert timing["convolution_seconds"] > 0 and timing["peak_gigabytes"] > 0
    assert report["released_seconds"] == {}
    assert report["machine"]["threads"] >= 1
    assert {"python", "torch", "open_clip_torch"} <= set(report["machine"]["versions"])

    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("fp32", "bf16", "GFLOP a step", "fraction"))


def test_without_a_folder_nothing_is_written(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(dataclasses.replace(tiny, precisions=("fp32",)))
    assert not list(tmp_path.iterdir())


def test_the_released_step_is_timed_when_asked_for(
    tiny: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(dataclasses.replace(tiny, precisions=("fp32",), compare_released=True))
    assert len(report["released_seconds"]) == 2
    assert all(seconds > 0 for seconds in report["released_seconds"].values())
    assert capsys.readouterr().out.count("the released loop, ") == 2


def test_the_released_convolutions_give_the_same_images(tiny: Config) -> None:
    torch.manual_seed(0)
    generator, _ = random_networks(tiny)
    generator.double()
    with torch.no_grad():
        for layer in generator.convs:
            layer.noise_strength.fill_(0.3)  # type: ignore[operator,union-attr]
        ws = generator.mapping(torch.randn(3, 8, dtype=torch.float64))
        expected = generator.synthesis(ws)
        layers: Any = generator.convs
        generator.convs = nn.ModuleList(GroupedConv(layer) for layer in layers)
        torch.testing.assert_close(generator.synthesis(ws), expected)


def test_twice_the_sources_are_twice_the_operations(tiny: Config) -> None:
    more = dataclasses.replace(tiny, sources=4)
    assert count_operations(more) == 2 * count_operations(tiny)


def test_chunks_render_once_more_in_the_backward_pass(tiny: Config) -> None:
    chunked = count_operations(dataclasses.replace(tiny, max_images=1))
    assert chunked / count_operations(tiny) == pytest.approx(1.5, abs=0.1)


def test_a_step_at_full_size_is_about_790_gflop() -> None:
    assert count_operations(Config()) / 1e9 == pytest.approx(790, rel=0.02)


def test_a_step_that_is_faster_than_a_floor_is_named_and_not_clipped(
    tiny: Config,
) -> None:
    report = run(dataclasses.replace(tiny, precisions=("fp32",)))
    [row] = report["runs"]
    slow = {"matrix_gflops": 1e-9, "convolution_gflops": 1e-6}
    timing = timing_of("fp32", row["seconds"], 10**6, slow, 1, 1.0)
    assert timing["fraction"] > 1 and timing["above_limit"] == ["operations"]
    table = report_table({**report, "runs": [{**row, **timing}]})
    assert "faster than its floor of operations" in table


def test_bytes_that_a_step_must_move_are_of_maps_and_weights(tiny: Config) -> None:
    maps = 8 * 4**2 + 2 * (8 * 8**2 + 6 * 16**2 + 4 * 32**2)
    assert least_bytes(tiny, 4) - least_bytes(tiny, 2) == 5 * tiny.sources * maps * 2
    weights = least_bytes(tiny, 0) / 8
    generator, embedder = random_networks(tiny)
    assert 0 < weights < sum(p.numel() for net in (generator, embedder) for p in net.parameters())


def test_convolutions_are_found_both_ways_and_are_most_of_a_step(tiny: Config) -> None:
    watch = Convolutions()
    take_shapes_through(tiny, watch)
    wide = dataclasses.replace(tiny, channels=(64, 64, 64, 64))
    rate, seconds = convolution_rate(wide, torch.float32)
    assert {key[0] for key in watch.found} == {
        torch.ops.aten.convolution.default,
        torch.ops.aten.convolution_backward.default,
    }
    assert 0.5 * count_operations(wide) < rate * 1e9 * seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps"),
        ({"resolution": 16, "compare_released": True}, "--resolution 32"),
    ],
)
def test_settings_that_time_nothing_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Config(**change))


def test_an_unknown_encoder_is_refused(tiny: Config) -> None:
    with pytest.raises(ValueError, match="--clip"):
        count_operations(dataclasses.replace(tiny, clip="ViT-B-33"))
