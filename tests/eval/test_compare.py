"""The comparison: what it reports, what it keeps, and what it refuses."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.drawn.readings import READINGS
from data.targets import split_of
from eval import answers, compare, compare_judge, methods
from eval.charts import Series, bars, chart
from eval.compare import Config, run
from eval.judging import Judges, edited_images, goal_of, judge, released_scores, scores_of
from eval.metrics import released_score
from eval.report import report_text
from eval.sets import ADVERSARIAL, IN_RANGE, OUT_OF_RANGE, EvalSet, samples
from eval.summary import Trial, by_rank, differences, means
from predictor.load import load_essence
from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from targetclip.sources import generated_sources
from targetclip.world import load_parts, load_world


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Fewer sources than people want."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "BANK", 12)
        patch.setattr(compare_judge, "RELEASED_SOURCES", 5)
        yield


def write_mapper(path: Path, world: str, seed: int = 0) -> Path:
    """As after training: answers differ from target to target."""
    parts = load_parts(load_world(world), torch.device("cpu"))
    generator, embedder = parts.generator, parts.embedder
    sizes = (embedder.embed_dim, generator.num_ws, generator.w_dim)
    prints = (generator.fingerprint, embedder.fingerprint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = Mapper(MapperConfig(*sizes, *prints, width=8, depth=1))
        torch.nn.init.normal_(mapper.direction.weight)
    save_mapper(mapper, path, MapperRecord({}, {}, "MIT", "nothing", "0"))
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
    """A comparison, and what it said."""
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
    assert {"transfer", "consistency", "additivity", "outside"} == set(
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
    assert report["released"]["sources"] == 5 and report["released"]["targets"] == 2


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
    report = run(Config(out=tmp_path, only=("drawn-answer",), targets=2, sources=3, references=4))
    assert set(report["sets"]) == {IN_RANGE, OUT_OF_RANGE}
    row = report["sets"][IN_RANGE]["methods"]["drawn-answer"]
    assert min(row["scores"]["essence"]) > 0.6 and min(row["scores"]["identity"]) > 0.2
    assert set(row["attributes"]["identity"]) == {r.name for r in READINGS if not r.essence}
    assert set(row["attributes"]["essence"]) <= {r.name for r in READINGS if r.essence}
    # The right answer leaves the background as it is.
    assert max(row["scores"]["outside"]) == 0
    assert (tmp_path / "in-range essence.png").is_file()
    assert report["judges"]["features"] == "the attribute reader's penultimate layer"


# What it keeps


def noting(asked: list[str], original: Callable[..., Any]) -> Callable[..., Any]:
    """Notes which method is run."""

    def timed(method: methods.Method, *rest: Any) -> Any:
        found: Any = method.find
        asked.append(getattr(found, "func", found).__name__)
        return original(method, *rest)

    return timed


def found_anew(made: Config, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which methods are run, for a set each, when this is asked for."""
    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(answers, "timed", noting(asked, answers.timed))
        bench = compare.make_bench(made, load_world(made.world), torch.device("cpu"))
        judges = compare.make_judges(made, load_world(made.world), bench)
        compare.find_all(made, bench, compare.make_sets(made, bench, judges), made.only)
    return asked


def test_a_finished_method_is_not_run_again(
    compared: tuple[Config, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, report = compared
    assert found_anew(made, monkeypatch) == []
    again = run(made)
    assert again["sets"] == report["sets"] and again["released"] == report["released"]


def test_what_changed_is_run_again_and_nothing_else(
    compared: tuple[Config, dict[str, Any]],
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = dataclasses.replace(compared[0], out=tmp_path)
    shutil.copytree(compared[0].out / "answers", tmp_path / "answers")
    other = write_mapper(tmp_path / "other.safetensors", str(tiny_world), seed=1)
    changed = dataclasses.replace(made, mapper=other)
    assert found_anew(changed, monkeypatch) == ["by_mapper", "by_mapper"]
    damaged = tmp_path / "answers" / "in-range release.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert found_anew(changed, monkeypatch) == ["taught"]
    reseeded = dataclasses.replace(changed, seed=1)
    assert found_anew(reseeded, monkeypatch) == ["taught", "by_clip_blending"]
    fewer = dataclasses.replace(reseeded, slow=1)
    assert found_anew(fewer, monkeypatch) == ["taught", "by_clip_blending"]
    assert found_anew(fewer, monkeypatch) == []


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("mappr",)}, "--only: expected some of mapper"),
        ({"only": ("auto",)}, "--only auto: .*not calibrated"),
        ({"only": ("ridge",)}, "--only ridge: .*--pairs"),
        ({"sources": 1}, "--sources: expected 2 or more, found 1"),
        ({"slow": 0}, "--slow: expected 1 or more, found 0"),
        ({"mapper": None}, "--mapper: expected a mapper's file"),
        ({"trust_folder": True}, "--trust-folder: expected --folder"),
        ({"judge_pretrained": "openai"}, "--judge-pretrained: expected --judge"),
        ({"folder": Path("nowhere")}, "--folder: expected a folder"),
        ({"pairs": Path("nowhere")}, "SHA256SUMS"),
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
    assert set(said) == set(methods.METHODS) - set(chosen)
    assert "eval.calibrate" in said["auto"] and "--pairs" in said["ridge"]
    assert "--quick" in said["paper"] and "--encoder" in said["encoder"]
    slower, _ = compare.choose_methods(dataclasses.replace(made, quick=False), bench)
    assert {"paper", "release", "clip-blending"} <= set(slower)
    assert made.count == 3 and Config(out=tmp_path, quick=True).count == 8


def test_an_error_is_one_line_and_exit_code_one(
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--out", str(tmp_path), "--world", str(tiny_world)]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --mapper") and error.count("\n") == 1


# Judges


class Brightness:
    """An identity model by whom everybody is as bright as he is, and that expects [-1, 1]."""

    fingerprint = "bright"

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)) + 0.02, dim=1)


def tiny_judges(world: Path, **changes: Any) -> Judges:
    essence = load_essence(load_world(str(world)), torch.device("cpu"))
    judges = Judges(essence.generator, essence.embedder, None, None, None, 8)
    return dataclasses.replace(judges, **changes)


def sources_of(judges: Judges, count: int = 3) -> Tensor:
    return generated_sources(judges.generator, 1.0, count, 3)


def test_the_released_fault_is_in_the_range_of_results_alone(tiny_world: Path) -> None:
    judges = tiny_judges(tiny_world, identity=Brightness())
    sources, targets = sources_of(judges), samples(judges.generator, 1.0, 2)
    references = judges.look(judges.render(sources)).features
    nothing = torch.zeros(2, *sources.shape[1:])
    found = released_scores(judges, sources, nothing, targets, references)
    assert found["identity"].mean == pytest.approx(100, abs=1e-3)
    assert found["identity"].deviation == pytest.approx(0, abs=1e-3)
    images = judges.render(sources).clamp(-1, 1)
    model = Brightness()
    shown = model.embed_images(images / 2 + 0.5)
    expected = released_score(shown[None], model.embed_images(images)[None])
    assert found["identity_released"].mean == pytest.approx(expected.mean, abs=1e-3)
    assert expected.mean < 99
    assert found["fid"].mean == pytest.approx(0, abs=1e-4)


def test_the_released_evaluation_edits_at_strength_1_2(tiny_world: Path) -> None:
    judges = tiny_judges(tiny_world)
    sources, targets = sources_of(judges), samples(judges.generator, 1.0, 2)
    references = judges.look(judges.render(sources)).features
    edits = torch.randn(2, *sources.shape[1:], generator=torch.Generator().manual_seed(0))
    found = released_scores(judges, sources, edits, targets, references)
    assert set(found) == {"semantic", "fid"}  # nobody here knows who is who
    goal = judges.embedder.embed_pictures(list(targets.pictures))
    images = [judges.render(sources + 1.2 * edit) for edit in edits]
    looks = torch.stack([judges.look(each).embeddings for each in images])
    assert found["semantic"] == released_score(looks, goal[:, None])


def trial(judges: Judges, sources: Tensor, edits: Tensor, targets: EvalSet) -> Trial:
    before = judges.render(sources)
    judged = judge(judges, before, edited_images(judges, sources, edits))
    return Trial.of(judged, judges.look(before), goal_of(judges, targets))


def test_all_judges_that_are_there_give_a_score(tiny_world: Path) -> None:
    judges = tiny_judges(tiny_world, identity=Brightness())
    judges = dataclasses.replace(judges, second=judges.embedder)
    sources, targets = sources_of(judges), samples(judges.generator, 1.0, 2)
    still = trial(judges, sources, torch.zeros(2, *sources.shape[1:]), targets)
    assert list(still.scores) == [
        "transfer", "consistency", "person", "second", "additivity", "outside",
    ]  # fmt: skip
    torch.testing.assert_close(still.scores["person"], torch.ones(2))
    torch.testing.assert_close(still.scores["second"], still.scores["transfer"])
    assert not still.scores["additivity"].any() and not still.scores["outside"].any()
    assert judges.features_of == "the second judge's embedding"
    assert scores_of(still.judged, still.before, still.goal).keys() == still.scores.keys()


def test_a_method_that_answered_fewer_targets_is_compared_on_those(tiny_world: Path) -> None:
    judges = tiny_judges(tiny_world)
    sources, targets = sources_of(judges), samples(judges.generator, 1.0, 3)
    edits = torch.randn(3, *sources.shape[1:], generator=torch.Generator().manual_seed(0))
    whole = trial(judges, sources, edits, targets)
    part = trial(judges, sources, edits[:2], targets.part(0, 2))
    references = judges.look(judges.render(sources)).features
    assert set(means({"a": whole, "b": part}, 3, references, 0)) == {"a"}
    few = means({"a": whole, "b": part}, 2, references, 0)
    assert few["a"]["transfer"] == pytest.approx(few["b"]["transfer"])
    assert few["a"]["fid"] == pytest.approx(few["b"]["fid"]) and few["a"]["images"] == 6
    paired = differences({"a": whole, "b": part}, "a", 0)["b"]["transfer"]
    assert paired["count"] == 2 and paired["mean"] == pytest.approx(0, abs=1e-6)


def test_ranks_are_of_the_score() -> None:
    scores = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.7])
    assert by_rank(scores) == {"best": 1, "median": 2, "worst": 3}
    assert by_rank(scores[:1]) == {"best": 0, "median": 0, "worst": 0}


# Charts


def count_colour(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    counts: Iterable[Any] = picture.getcolors(1 << 20) or ()
    return sum(number for number, found in counts if found == colour)


def test_points_lie_where_their_numbers_say() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    series = [Series("a", [(0.01, 1.0)], red), Series("b", [(10.0, 2.0)], blue, hollow=True)]
    picture = chart("c", series, "x", "y", log_x=True, levels={"level": 1.5})
    pixels = {
        colour: [
            (x, y)
            for x in range(80, 750)
            for y in range(45, 540)
            if picture.getpixel((x, y)) == colour
        ]
        for colour in (red, blue)
    }
    assert max(x for x, _ in pixels[red]) < min(x for x, _ in pixels[blue])
    assert min(y for _, y in pixels[red]) > max(y for _, y in pixels[blue])  # upwards is more
    assert len(pixels[red]) > len(pixels[blue]) > 0


def test_a_bar_is_as_long_as_its_number() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    groups = {"a": {"hat": 1.0, "beard": 1.0}, "b": {"hat": 0.5, "beard": -0.25}}
    picture = bars("c", groups, {"a": red, "b": blue}, "y")
    legend = 80  # pixels of a legend's dot, about
    assert count_colour(picture, red) / (count_colour(picture, blue) - legend) == pytest.approx(
        2 / 0.75, rel=0.1
    )


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        chart("empty", [Series("a", [], (0, 0, 0))], "x", "y")
    with pytest.raises(ValueError, match="found none"):
        bars("empty", {"a": {}}, {"a": (0, 0, 0)}, "y")
