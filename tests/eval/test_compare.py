"""The comparison: what it reports, what it keeps, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import module_exit_code
from PIL import Image
from torch import Tensor

from data.targets import split_of
from eval import compare
from eval.compare import Config, run
from eval.methods import METHODS
from eval.reader import READINGS
from eval.report import report_text
from eval.sets import ADVERSARIAL, HELD_OUT_STYLES, IN_RANGE, STYLES
from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from targetclip.command import locked_folder
from targetclip.seeds import TEST_SOURCES
from targetclip.world import load_scene, load_world


def write_mapper(path: Path, world: str, seed: int = 0) -> Path:
    """As after training: answers differ from target to target."""
    scene = load_scene(load_world(world))
    config = MapperConfig(
        embed_dim=scene.embedder.embed_dim,
        num_ws=scene.generator.num_ws,
        w_dim=scene.generator.w_dim,
        generator=scene.generator.fingerprint,
        embedder=scene.embedder.fingerprint,
        width=8,
        depth=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = Mapper(config)
        torch.nn.init.normal_(mapper.direction.weight)
    record = MapperRecord(
        recipe={}, calibration={}, licence="MIT", trained_on="nothing", version="0"
    )
    save_mapper(mapper, path, record)
    return path


@pytest.fixture(scope="module")
def mapper(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mapper(tmp_path_factory.mktemp("mapper") / "m.safetensors", str(tiny_world))


def config(world: Path, mapper: Path, out: Path, **changes: Any) -> Config:
    small: dict[str, Any] = {
        "targets": 3,
        "slow": 2,
        "sources": 2,
        "references": 4,
        "max_steps": 2,
        "precision": "fp32",
        "only": ("mapper", "release", "clip-blending", "latent-blending"),
    }
    return Config(out=out, world=str(world), mapper=mapper, **{**small, **changes})


@pytest.fixture(scope="module")
def compared(
    tiny_world: Path, mapper: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    """A comparison, and its report."""
    made = config(tiny_world, mapper, tmp_path_factory.mktemp("compared") / "out")
    return made, run(made)


# What it reports


def test_every_score_of_every_target_is_reported(
    compared: tuple[Config, dict[str, Any]],
) -> None:
    made, report = compared
    assert json.loads((made.out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert set(report["sets"]) == {IN_RANGE, ADVERSARIAL}
    found = report["sets"][IN_RANGE]
    assert [split_of(name) for name, _ in found["targets"]] == ["test"] * 3
    counts = {name: row["count"] for name, row in found["methods"].items()}
    assert counts == {"mapper": 3, "release": 2, "clip-blending": 2, "latent-blending": 3}
    assert set(found["all"]) == {"mapper", "latent-blending"}
    assert set(found["first"]) == set(counts)
    assert set(found["differences"]) == set(counts) - {"mapper"}
    # A slow search has nothing to look for there.
    assert set(report["sets"][ADVERSARIAL]["methods"]) == {"mapper", "latent-blending"}
    for row in found["methods"].values():
        for values in row["scores"].values():
            assert len(values) == row["count"]
        assert row["seconds"] > 0
    timings = {name: row["timing"] for name, row in found["methods"].items()}
    assert timings["mapper"] == "alone" and timings["release"] == "share"
    assert {"transfer", "consistency", "additivity", "outside", "sharpness"} == set(
        found["methods"]["mapper"]["scores"]
    )


def test_means_and_differences_are_those_of_the_targets(
    compared: tuple[Config, dict[str, Any]],
) -> None:
    found = compared[1]["sets"][IN_RANGE]

    def scores(name: str) -> Tensor:
        return torch.tensor(found["methods"][name]["scores"]["transfer"])

    assert found["all"]["mapper"]["transfer"]["mean"] == pytest.approx(
        float(scores("mapper").mean())
    )
    first = found["first"]["mapper"]["transfer"]
    assert (
        first["mean"] == pytest.approx(float(scores("mapper")[:2].mean())) and first["count"] == 2
    )
    paired = found["differences"]["release"]["transfer"]
    difference = float((scores("mapper")[:2] - scores("release")).mean())
    assert paired["mean"] == pytest.approx(difference, abs=1e-6) and paired["count"] == 2
    assert paired["low"] <= paired["mean"] <= paired["high"]


def test_the_report_for_people_has_the_same_numbers(
    compared: tuple[Config, dict[str, Any]],
) -> None:
    made, report = compared
    text = (made.out / "report.md").read_text()
    assert text == report_text(report)
    row = report["sets"][IN_RANGE]["all"]["mapper"]["transfer"]
    assert f"| mapper | {row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |" in text
    released = report["released"]["methods"]
    assert set(released) == {"mapper", "release", "latent-blending"}  # others know 2 sources only
    semantic = released["release"]["semantic"]
    assert f"{semantic['mean']:.1f} ± {semantic['deviation']:.1f}" in text
    assert report["released"]["sources"] == 68 and report["released"]["targets"] == 2


def test_figures_and_grids_are_pictures(compared: tuple[Config, dict[str, Any]]) -> None:
    out = compared[0].out
    names = {path.stem for path in out.glob("*.png")}
    assert names == {"expected", "in-range seconds", "adversarial seconds"}
    grids = {path.stem for path in (out / "grids").glob("*.png")}
    assert {"in-range all", "in-range mapper", "in-range clip-blending"} <= grids
    assert "adversarial release" not in grids
    for path in [*out.glob("*.png"), *(out / "grids").glob("*.png")]:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_the_sweep_passes_through_the_scores_at_strength_one(
    compared: tuple[Config, dict[str, Any]],
) -> None:
    report = compared[1]
    for name, rows in report["sweep"].items():
        assert [row["strength"] for row in rows] == [0.4, 0.6, 0.8, 1.0, 1.2, 1.4]
        expected = report["sets"][IN_RANGE]["first"][name]["transfer"]["mean"]
        assert rows[3]["transfer"] == pytest.approx(expected, abs=1e-5)


def test_the_bundled_world_is_judged_by_its_reader(tmp_path: Path) -> None:
    report = run(Config(out=tmp_path, only=("right-answer",), targets=2, sources=3, references=4))
    assert set(report["sets"]) == {IN_RANGE, STYLES, HELD_OUT_STYLES}
    row = report["sets"][IN_RANGE]["methods"]["right-answer"]
    assert min(row["scores"]["essence"]) > 0.6 and min(row["scores"]["identity"]) > 0.2
    assert set(row["attributes"]["identity"]) == {r.name for r in READINGS if not r.essence}
    assert set(row["attributes"]["essence"]) <= {r.name for r in READINGS if r.essence}
    assert max(row["scores"]["outside"]) < 0.02  # the background stays
    assert (tmp_path / "in-range essence.png").is_file()
    assert report["judges"]["features"] == "the attribute reader's penultimate layer"


def test_a_mapper_that_reads_its_sources_is_judged_beside_its_one_direction(
    who_world: Path, reading_mapper: Path, tmp_path: Path
) -> None:
    only = ("mapper", "one-direction", "auto", "own-mapper")
    report = run(config(who_world, reading_mapper, tmp_path / "out", only=only))
    found = report["sets"][IN_RANGE]
    assert set(found["methods"]) == set(only)
    scores = {name: found["methods"][name]["scores"] for name in ("mapper", "one-direction")}
    for name in ("transfer", "consistency", "additivity", "person"):
        assert scores["mapper"][name] != pytest.approx(scores["one-direction"][name], abs=1e-4)
    assert found["differences"]["one-direction"]["transfer"]["count"] == 3
    assert set(report["released"]["methods"]) == {"mapper", "one-direction", "auto"}
    released = [report["released"]["methods"][n]["semantic"]["mean"] for n in only[:2]]
    assert abs(released[0] - released[1]) > 1e-3
    assert set(report["sweep"]) == set(only)
    assert (tmp_path / "out" / "grids" / "in-range one-direction.png").is_file()
    again = run(config(who_world, reading_mapper, tmp_path / "out", only=only))
    assert again["sets"] == report["sets"] and again["released"] == report["released"]


def test_latents_of_a_file_are_the_sources_of_every_method(
    compared: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    scene = load_scene(load_world(compared[0].world))
    path, other = tmp_path / "w_plus.npy", tmp_path / "other.npy"
    np.save(path, scene.sources(2, TEST_SOURCES).numpy())
    np.save(other, scene.sources(3, 1).numpy())
    only = ("mapper", "clip-blending")
    made = dataclasses.replace(compared[0], out=tmp_path / "out", sources=path, only=only)
    report = run(made)
    for name in only:  # as with generated sources, which have the same latents
        generated, found = (r["sets"][IN_RANGE]["methods"][name] for r in (compared[1], report))
        for score, values in generated["scores"].items():
            assert found["scores"][score] == pytest.approx(values, abs=1e-5), score
    assert report["sources"] == report["released"]["sources"] == 2
    assert report["seeds"]["sources"] is None and len(report["fingerprints"]["sources"]) == 64
    assert f"2 sources (latents of {path})" in (made.out / "report.md").read_text()
    # Edits of single sources, and targets that are pictures of them, are others for other sources.
    changed = ["adversarial mapper", "in-range clip-blending"]
    assert run_anew(dataclasses.replace(made, sources=other)) == changed


# What it keeps


def run_anew(made: Config) -> list[str]:
    """Find all answers, and return the names of those that were not kept, each with its set's."""
    folder = made.out / "answers"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    world = load_world(made.world)
    bench = compare.make_bench(made, world, torch.device("cpu"))
    judges = compare.make_judges(made, world, bench)
    compare.find_all(made, bench, compare.make_sets(made, bench, judges), made.only)
    after = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    return sorted(path.stem for path in after if after[path] != before.get(path))


def test_a_finished_method_is_not_run_again(compared: tuple[Config, dict[str, Any]]) -> None:
    made, report = compared
    assert run_anew(made) == []
    again = run(made)
    assert again["sets"] == report["sets"] and again["released"] == report["released"]


def test_what_changed_is_run_again_and_nothing_else(
    compared: tuple[Config, dict[str, Any]], tiny_world: Path, tmp_path: Path
) -> None:
    made = dataclasses.replace(compared[0], out=tmp_path)
    shutil.copytree(compared[0].out / "answers", tmp_path / "answers")
    other = write_mapper(tmp_path / "other.safetensors", str(tiny_world), seed=1)
    changed = dataclasses.replace(made, mapper=other)
    assert run_anew(changed) == ["adversarial mapper", "in-range mapper"]
    damaged = tmp_path / "answers" / "in-range release.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert run_anew(changed) == ["in-range release"]
    searches = ["in-range clip-blending", "in-range release"]
    reseeded = dataclasses.replace(changed, seed=1)
    assert run_anew(reseeded) == searches
    fewer = dataclasses.replace(reseeded, slow=1)
    assert run_anew(fewer) == searches
    assert run_anew(fewer) == []


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("mappr",)}, "--only: expected some of mapper"),
        ({"only": ("auto",)}, "--only auto: .*not calibrated"),
        ({"only": ("one-direction",)}, "--only one-direction: .*no correction for each source"),
        ({"only": ("ridge",)}, "--only ridge: .*--pairs"),
        ({"sources": 1}, "--sources: expected 2 or more, found 1"),
        ({"sources": Path("no.npy")}, "--sources: no file at 'no.npy'"),
        ({"sources": Path("o.npy"), "only": ("right-answer",)}, "--only right-answer: nobody"),
        ({"slow": 0}, "--slow: expected 1 or more, found 0"),
        ({"mapper": None}, "--mapper: expected a mapper's file"),
        ({"trust_folder": True}, "--trust-folder: expected --folder"),
        ({"judge_pretrained": "openai"}, "--judge-pretrained: expected --judge"),
        ({"folder": Path("nowhere")}, "--folder: expected a folder"),
        ({"pairs": Path("nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, tiny_world: Path, mapper: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(dataclasses.replace(config(tiny_world, mapper, tmp_path), **changes))
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_said(tiny_world: Path, mapper: Path, tmp_path: Path) -> None:
    made = config(tiny_world, mapper, tmp_path, only=(), quick=True)
    world = load_world(made.world)
    bench = compare.make_bench(made, world, torch.device("cpu"))
    chosen, left_out = compare.choose_methods(made, bench)
    assert chosen == ["mapper", "consistent", "latent-blending"]
    said = dict(line.split(": ", 1) for line in left_out)
    assert set(said) == set(METHODS) - set(chosen)
    assert "eval.calibrate" in said["auto"] and "--pairs" in said["ridge"]
    assert "--quick" in said["paper"] and "--encoder" in said["encoder"]
    slower, _ = compare.choose_methods(dataclasses.replace(made, quick=False), bench)
    assert {"paper", "release", "clip-blending"} <= set(slower)
    assert made.count == 3 and Config(out=tmp_path, quick=True).count == 8


def test_an_error_is_one_line_and_exit_code_one(
    tiny_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert module_exit_code(compare, "--out", tmp_path, "--world", tiny_world) == 1
    loading, error = capsys.readouterr().err.splitlines()
    assert loading == "loading world tiny" and "eval.compare: error: --mapper" in error


def test_a_second_run_into_a_folder_and_a_misspelt_method_are_refused(
    tiny_world: Path, tmp_path: Path
) -> None:
    with (
        locked_folder(tmp_path),
        pytest.raises(BlockingIOError, match="another run is writing into"),
    ):
        compare.run(Config(out=tmp_path, world=str(tiny_world)))
    with pytest.raises(ValueError, match="found 'mean-directions': did you mean 'mean-direction'"):
        compare.run(Config(out=tmp_path, only=("mean-directions",)))
