"""Mappers side by side at a size that takes seconds: what is reported, kept and refused."""

import copy
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import module_exit_code
from PIL import Image

from eval.judging import face_judges, goal_of
from eval.methods import predict
from eval.sets import study_set
from eval.studies import ablation
from eval.studies.ablation import (
    Config,
    figures_of,
    network_of,
    run,
    target_scores,
    training_of,
)
from eval.studies.teachers import direction_scores
from predictor.mapper import Prediction, load_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from targetclip.recipes import RECIPES
from targetclip.scene import Scene
from targetclip.seeds import VALIDATION_SOURCES

TRAINED = {"schedule": ["pairs:600", "transfer+pairs:40"], "num_pairs": 50, "pairs": "1f"}
TRAINED |= {"noise": 0.1, "expects": True}


@pytest.fixture
def write(write_mapper: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes mappers of random weights into folders of their own."""

    def written(name: str, seed: int = 0, record: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "mappers" / name / "mapper.safetensors"
        return write_mapper(path, TRAINED if record is None else record, seed)

    return written


def configured(face_world: Path, folder: Path, *mappers: Path, **changes: Any) -> Config:
    usual: dict[str, Any] = {"world": str(face_world), "targets": 2, "held_out": 2}
    return Config(**{"out": folder, "mappers": mappers, **usual, **changes})


@pytest.fixture
def config(face_world: Path, tmp_path: Path) -> Callable[..., Config]:
    return partial(configured, face_world, tmp_path / "out")


@dataclass(frozen=True)
class Judged:
    """Mappers side by side: c has the weights of z and another record, a is another without one."""

    config: Config
    rows: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def judged(
    face_world: Path, write_mapper: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Judged:
    folder = tmp_path_factory.mktemp("judged")
    mappers = [
        write_mapper(folder / name / "mapper.safetensors", record, seed)
        for name, record, seed in (("z", TRAINED, 0), ("a", {}, 1), ("c", {"noise": 0.3}, 0))
    ]
    config = configured(face_world, folder / "out", *mappers, targets=4)
    with redirect_stdout(StringIO()) as printed:
        rows = run(config)
    return Judged(config, rows, printed.getvalue())


Write = Callable[..., Path]
Configured = Callable[..., Config]


def mark(config: Config, name: str) -> dict[str, Any]:
    """Run, and mark a row of the report, so that it is known again if it is kept."""
    run(config)
    path = config.out / "report.json"
    report = json.loads(path.read_text())
    row: dict[str, Any] = report["mappers"][name]
    row["norm"] = -1.0 - len(report["mappers"])
    path.write_text(json.dumps(report))
    return row


def figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("recipe", "trained")}


# What is said


def test_a_mapper_is_judged_as_the_study_judges_directions(judged: Judged, scene: Scene) -> None:
    row = copy.deepcopy(judged.rows["z"])
    mapper, targets = load_mapper(judged.config.mappers[0])[0], study_set(4)
    with torch.no_grad():
        answered = mapper(scene.embedder.embed_pictures(targets.pictures))
    sources = scene.sources(2, VALIDATION_SOURCES)
    judges = face_judges(scene)
    goal = goal_of(judges, targets)
    expected = direction_scores(judges, goal, sources, answered.directions)
    assert row["transfer"]["mean"] == pytest.approx(expected.pop("transfer"), abs=1e-5)
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    norms = answered.directions.flatten(1).norm(dim=1)
    assert row["norm"] == pytest.approx(float(norms.mean()), abs=1e-5)
    reached = torch.tensor(row["each"]["transfer"])
    error = float((answered.expected - reached).abs().mean())
    assert error > 0.01 and row["expected_error"] == pytest.approx(error, abs=1e-5)
    interval = row["transfer"]
    assert interval["count"] == 4 and interval["mean"] == pytest.approx(float(reached.mean()))
    assert float(reached.min()) <= interval["low"] < interval["mean"] < interval["high"]


def test_identical_mappers_have_identical_figures_and_others_have_not(judged: Judged) -> None:
    rows = judged.rows
    assert figures(rows["z"]) == figures(rows["c"])
    assert rows["z"]["trained"] != rows["c"]["trained"]
    for name in ("transfer", "consistency", "identity", "norm", "expected_error"):
        assert rows["a"][name] != rows["z"][name], name


def test_the_better_of_two_answers_has_the_better_scores(scene: Scene) -> None:
    """Directions to sources that are judged good or bad by the target's own embedding."""
    judges, sources = face_judges(scene), scene.sources(3, VALIDATION_SOURCES)
    goal = goal_of(judges, study_set(2))
    random = torch.Generator().manual_seed(0)
    tried = 3 * torch.randn(8, *sources.shape[1:], generator=random)

    def scores(directions: torch.Tensor) -> dict[str, torch.Tensor]:
        return target_scores(judges, goal, sources, Prediction(directions, torch.zeros(2)))

    transfer = torch.stack([scores(one.expand(2, -1, -1))["transfer"] for one in tried])
    best, worst = tried[transfer.argmax(dim=0)], tried[transfer.argmin(dim=0)]
    means = [figures_of(scores(edits), True, 0)["transfer"]["mean"] for edits in (best, worst)]
    assert means[0] > means[1] + 1e-3
    still = scores(torch.zeros_like(best))
    torch.testing.assert_close(still["identity"], torch.ones(2))
    assert still["essence"].abs().max() < 1e-5 and not still["norm"].any()


def test_scores_depend_neither_on_the_other_targets_nor_on_the_batch(
    judged: Judged, scene: Scene
) -> None:
    whole = judged.rows["z"]["each"]
    mapper = load_mapper(judged.config.mappers[0])[0]
    for part, at_once in ((2, None), (4, 1)):
        targets, small = study_set(part), replace(scene, max_images=at_once)
        answered = predict(small, mapper, targets.pictures)
        judges, sources = face_judges(small), small.sources(2, VALIDATION_SOURCES)
        scores = target_scores(judges, goal_of(judges, targets), sources, answered)
        for name, values in whole.items():
            assert values[:part] == pytest.approx(scores[name].tolist(), abs=1e-5), name


def test_the_table_has_a_row_a_mapper_in_the_order_given(judged: Judged) -> None:
    out, rows = judged.config.out, judged.rows
    text = (out / "report.md").read_text()
    assert judged.printed.strip() == text.strip()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    heads, first, second = lines[0], lines[2], lines[3]
    assert [first[0], second[0], lines[4][0]] == ["z", "a", "c"] and len(lines) == 5
    assert first[1:6] == ["8 x 1", "pairs:600, transfer+pairs:40", "640", "50", "0.1"]
    assert second[1:8] == ["8 x 1", *[""] * 6]
    interval = rows["z"]["transfer"]
    expected = f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
    assert first[heads.index("transfer score")] == expected
    assert first[heads.index("identity kept")] == f"{rows['z']['identity']:.3f}"
    report = json.loads((out / "report.json").read_text())
    assert list(report["mappers"]) == ["z", "a", "c"] and report["mappers"] == rows
    for name in rows:
        with Image.open(out / f"{name}.png") as sheet:
            assert len(sheet.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_a_mapper_that_was_not_taught_what_to_expect_is_not_blamed(
    write: Write, config: Configured
) -> None:
    record = {"schedule": ["pairs:600"], "pairs": "1f", "num_pairs": None, "expects": False}
    made = config(write("a", record=record))
    row = run(made)["a"]
    assert row["expected_error"] is None and row["trained"]["pairs"] == "all"
    assert (made.out / "report.md").read_text().splitlines()[2].endswith("|  |")


def test_a_training_without_pairs_used_none() -> None:
    recipe = {"schedule": ["transfer:4000"], "num_pairs": None, "pairs": None, "noise": 0.0}
    record = MapperRecord(
        recipe=recipe, calibration={}, licence="MIT", trained_on="nothing", version="0"
    )
    facts = {"stages": ["transfer:4000"], "steps": 4000, "pairs": None, "noise": 0.0}
    assert training_of(record) == {**facts, "decay": None, "identity_weight": None}
    recipe["recipe"] = vars(RECIPES["identity"])
    assert training_of(record) == {**facts, "decay": 1e-2, "identity_weight": 0.15}
    config = MapperConfig(
        embed_dim=4, num_ws=2, w_dim=3, generator="g", embedder="e", width=8, depth=2, rank=5
    )
    assert network_of(config) == "8 x 2, rank 5"


# Going on


def test_a_mapper_that_was_judged_is_not_judged_again(write: Write, config: Configured) -> None:
    first, second = write("a"), write("b", seed=1)
    before = mark(config(first), "a")
    sheet = config().out / "a.png"
    written = sheet.stat().st_mtime_ns
    rows = run(config(second, first))
    assert rows["a"] == before and list(rows) == ["b", "a"]
    assert sheet.stat().st_mtime_ns == written
    marked = mark(config(second, first), "b")
    assert run(config(second, first)) == {"b": marked, "a": before}
    # One alone: the other is not lost.
    assert list(run(config(first))) == ["a"]
    assert run(config(first, second)) == {"a": before, "b": marked}


def test_a_mapper_that_changed_is_judged_again_and_one_that_moved_is_not(
    write: Write, config: Configured
) -> None:
    first = write("a")
    row = mark(config(first), "a")
    moved = shutil.copytree(first.parent, first.parents[1] / "moved") / first.name
    assert run(config(moved))["moved"] == row
    assert (config().out / "moved.png").is_file()
    old = (config().out / "a.png").read_bytes()
    again = mark(config(write("a", seed=1)), "a")
    assert again["transfer"] != row["transfer"]
    assert (config().out / "a.png").read_bytes() != old
    # The same weights, trained by another recipe: targets may be preprocessed otherwise
    last = run(config(write("a", seed=1, record={})))["a"]
    assert last["recipe"] == {} and last["norm"] != again["norm"]


# What is refused


def test_another_comparison_is_refused(write: Write, config: Configured) -> None:
    made = config(write("a"))
    run(made)
    before = (made.out / "report.json").read_bytes()
    for changes in ({"seed": 1}, {"targets": 3}, {"held_out": 3}):
        with pytest.raises(ValueError, match="is of another comparison") as caught:
            run(replace(made, **changes))
        assert "\n" not in str(caught.value)
    assert (made.out / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mappers": ()}, "--mappers: expected one"),
        ({"targets": 1}, "--targets: expected 2 or more, found 1"),
        ({"held_out": 1}, "--held-out: expected 2 or more, found 1"),
        ({"mappers": (Path("nowhere/mapper.safetensors"),)}, "nowhere.*no such mapper file"),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, write: Write, config: Configured
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(replace(config(write("a")), **changes))
    assert "\n" not in str(caught.value) and not config().out.exists()


def test_a_mapper_of_another_generator_is_refused_before_any_is_judged(
    tiny_mapper: Path, write: Write, config: Configured
) -> None:
    with pytest.raises(ValueError, match=f"{tiny_mapper} was trained for generator"):
        run(config(write("a"), tiny_mapper))
    assert not config().out.exists()


def test_two_mappers_of_one_name_are_refused(
    write: Write, config: Configured, tmp_path: Path
) -> None:
    first = write("a")
    other = shutil.copytree(first.parent, tmp_path / "other" / "a") / first.name
    with pytest.raises(ValueError, match=r"folders of different names.*rename") as caught:
        run(config(first, other))
    assert str(first) in str(caught.value) and str(other) in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"schedule": ["pairs:many"]}, "schedule of stages NAME:STEPS"),
        ({"schedule": 7}, "schedule of stages NAME:STEPS"),
        ({"recipe": {"steps": "none"}}, "recipe unknown here"),
    ],
)
def test_a_record_that_is_not_understood_names_its_file(
    record: dict[str, Any], message: str, write: Write, config: Configured
) -> None:
    path = write("a", record=record)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        run(config(path))


def test_a_world_whose_pictures_the_reader_does_not_know_is_refused(
    tiny_world: Path, tiny_mapper: Path, config: Configured
) -> None:
    with pytest.raises(ValueError, match=r"--world: expected .* of 128 px.*, found one of 16 px"):
        run(config(tiny_mapper, world=str(tiny_world)))


def test_a_damaged_report_is_refused(write: Write, config: Configured) -> None:
    made = config(write("a"))
    made.out.mkdir()
    (made.out / "report.json").write_text('{"comparison": ')
    with pytest.raises(ValueError, match=r"report\.json' is damaged .*: delete it"):
        run(made)


def test_an_error_is_one_line_and_exit_code_one(
    face_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--out", tmp_path, "--world", face_world, "--mappers", "nowhere.safetensors")
    assert module_exit_code(ablation, *arguments) == 1
    error = capsys.readouterr().err
    assert "error: nowhere.safetensors" in error and error.count("\n") == 2  # one says what loads
