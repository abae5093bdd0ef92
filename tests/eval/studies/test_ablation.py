"""Mappers side by side at a size that takes seconds: what is said, kept and refused."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.drawn.sketch import SIZE
from eval.studies import ablation
from eval.studies.ablation import Config, Course, network_of, run, scores_of_each, trained_by
from eval.studies.teachers import HELD_OUT_SEED, draw_targets
from eval.studies.teachers import judge as study_judge
from predictor.mapper import Mapper, Prediction, load_mapper, save_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from predictor.transfer import EssenceTransfer
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.recipes import RECIPES
from targetclip.world import load_parts, load_world

TRAINED = {"schedule": ["pairs:600", "transfer+pairs:40"], "num_pairs": 50, "pairs": "1f"}
TRAINED |= {"noise": 0.1, "expects": True}


@pytest.fixture(scope="module", autouse=True)
def once() -> Iterator[None]:
    """Nothing is drawn or loaded twice: the checks of types make both slow."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_targets", "load_parts", "load_reader"):
            patch.setattr(ablation, name, cache(getattr(ablation, name)))
        yield


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny world, but of the size that the reader of faces reads."""
    folder = tmp_path_factory.mktemp("tiny64")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(
                resolution=SIZE, w_dim=16, z_dim=16, mapping_layers=2, channels=(8, 8, 8, 8, 8)
            )
        )
    save_safetensors(generator, folder / "generator.safetensors")
    path = folder / "world.toml"
    path.write_text(tiny_world.read_text().replace('inverter = "inverter.safetensors"\n', ""))
    return path


@pytest.fixture(scope="module")
def essence(world: Path) -> EssenceTransfer:
    parts = load_parts(load_world(str(world)), torch.device("cpu"))
    return EssenceTransfer(parts.generator, parts.embedder, truncation=1.0)


Write = Callable[..., Path]


@pytest.fixture
def write(essence: EssenceTransfer, tmp_path: Path) -> Write:
    """Writes mappers of random weights into folders of their own."""

    def written(name: str, seed: int = 0, record: dict[str, Any] | None = None) -> Path:
        generator, embedder = essence.generator, essence.embedder
        prints = (generator.fingerprint, embedder.fingerprint)
        sizes = (embedder.embed_dim, generator.num_ws, generator.w_dim)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            mapper = Mapper(MapperConfig(*sizes, *prints, width=8, depth=1))
            torch.nn.init.normal_(mapper.direction.weight)
        path = tmp_path / "mappers" / name / "mapper.safetensors"
        said = TRAINED if record is None else record
        save_mapper(mapper, path, MapperRecord(said, {}, "MIT", "nothing", "0"))
        return path

    return written


@pytest.fixture
def config(world: Path, tmp_path: Path) -> Callable[..., Config]:
    def made(*mappers: Path, **changes: Any) -> Config:
        usual: dict[str, Any] = {"world": str(world), "targets": 4, "held_out": 2}
        return Config(**{"out": tmp_path / "out", "mappers": mappers, **usual, **changes})

    return made


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fingerprints of the mappers that are judged from here on."""
    found: list[str] = []
    original = ablation.row_of

    def counted(course: Course, mapper: Mapper, seed: int) -> dict[str, Any]:
        found.append(mapper.fingerprint)
        return original(course, mapper, seed)

    monkeypatch.setattr(ablation, "row_of", counted)
    return found


Configured = Callable[..., Config]


def figures(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("recipe", "trained")}


# What is said


def test_a_mapper_is_judged_as_the_study_judges_directions(
    write: Write, config: Configured, essence: EssenceTransfer
) -> None:
    path = write("a")
    row = run(config(path))["a"]
    mapper = load_mapper(path)[0]
    targets = draw_targets(4)
    with torch.no_grad():
        answered = mapper(essence.embedder.embed_pictures(targets.pictures))
    sources = essence.generated_sources(2, HELD_OUT_SEED)
    expected = study_judge(essence, targets, sources, answered.directions)
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


def test_identical_mappers_have_identical_figures_and_others_have_not(
    write: Write, config: Configured
) -> None:
    rows = run(config(write("a"), write("b", record={"noise": 0.3}), write("c", seed=1)))
    assert list(rows) == ["a", "b", "c"]
    assert figures(rows["a"]) == figures(rows["b"])
    assert rows["a"]["trained"] != rows["b"]["trained"]
    for name in ("transfer", "consistency", "identity", "norm", "expected_error"):
        assert rows["c"][name] != rows["a"][name], name


def test_the_better_of_two_answers_has_the_better_scores(essence: EssenceTransfer) -> None:
    """Directions to sources that are judged good or bad by the target's own embedding."""
    targets = draw_targets(2)
    course = Course.of(essence, targets, 3)
    random = torch.Generator().manual_seed(0)
    tried = 3 * torch.randn(8, *course.sources.shape[1:], generator=random)
    each = [
        scores_of_each(course, Prediction(one.expand(2, -1, -1), torch.zeros(2))) for one in tried
    ]
    scores = torch.stack([found["transfer"] for found in each])
    best, worst = tried[scores.argmax(dim=0)], tried[scores.argmin(dim=0)]
    rows = [
        ablation.figures_of(scores_of_each(course, Prediction(edits, torch.zeros(2))), True, 0)
        for edits in (best, worst)
    ]
    assert rows[0]["transfer"]["mean"] > rows[1]["transfer"]["mean"] + 1e-3
    still = scores_of_each(course, Prediction(torch.zeros_like(best), torch.zeros(2)))
    torch.testing.assert_close(still["identity"], torch.ones(2))
    assert still["essence"].abs().max() < 1e-5 and not still["norm"].any()


def test_scores_depend_neither_on_the_other_targets_nor_on_the_batch(
    write: Write, config: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a")
    whole = run(config(path))["a"]["each"]
    few = run(config(path, targets=2, out=tmp_path / "few"))["a"]["each"]
    monkeypatch.setattr(
        ablation, "EssenceTransfer", lambda *a, **k: EssenceTransfer(*a, **k, max_images=1)
    )
    single = run(config(path, out=tmp_path / "single"))["a"]["each"]
    for name, values in whole.items():
        assert values[:2] == pytest.approx(few[name], abs=1e-5), name
        assert values == pytest.approx(single[name], abs=1e-5), name


def test_the_table_has_a_row_a_mapper_in_the_order_given(
    write: Write, config: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(write("z"), write("a", seed=1, record={}))
    rows = run(made)
    text = (made.out / "report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    heads, first, second = lines[0], lines[2], lines[3]
    assert [first[0], second[0]] == ["z", "a"] and len(lines) == 4
    assert first[1:6] == ["8 x 1", "pairs:600, transfer+pairs:40", "640", "50", "0.1"]
    assert second[1:8] == ["8 x 1", *[""] * 6]
    interval = rows["z"]["transfer"]
    expected = f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
    assert first[heads.index("transfer score")] == expected
    assert first[heads.index("identity kept")] == f"{rows['z']['identity']:.3f}"
    report = json.loads((made.out / "report.json").read_text())
    assert list(report["mappers"]) == ["z", "a"] and report["mappers"] == rows
    for name in rows:
        with Image.open(made.out / f"{name}.png") as sheet:
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
    found = trained_by(MapperRecord(recipe, {}, "MIT", "nothing", "0"))
    said = {"stages": ["transfer:4000"], "steps": 4000, "pairs": None, "noise": 0.0}
    assert found == {**said, "decay": None, "identity_weight": None}
    recipe["recipe"] = vars(RECIPES["identity"])
    found = trained_by(MapperRecord(recipe, {}, "MIT", "nothing", "0"))
    assert found == {**said, "decay": 1e-2, "identity_weight": 0.15}
    config = MapperConfig(4, 2, 3, "g", "e", width=8, depth=2, rank=5)
    assert network_of(config) == "8 x 2, rank 5"


# Going on


def test_a_mapper_that_was_judged_is_not_judged_again(
    write: Write, config: Configured, judged: list[str]
) -> None:
    first, second = write("a"), write("b", seed=1)
    before = run(config(first))
    sheet = config().out / "a.png"
    seen = sheet.stat().st_mtime_ns
    rows = run(config(second, first))
    assert len(judged) == 2 and rows["a"] == before["a"] and list(rows) == ["b", "a"]
    assert sheet.stat().st_mtime_ns == seen
    assert run(config(second, first)) == rows and len(judged) == 2
    # One alone: the other is not lost.
    assert list(run(config(first))) == ["a"]
    assert run(config(first, second)) == {"a": rows["a"], "b": rows["b"]} and len(judged) == 2


def test_a_mapper_that_changed_is_judged_again_and_one_that_moved_is_not(
    write: Write, config: Configured, judged: list[str]
) -> None:
    first = write("a")
    row = run(config(first))["a"]
    moved = shutil.copytree(first.parent, first.parents[1] / "moved") / first.name
    assert run(config(moved))["moved"] == row and len(judged) == 1
    assert (config().out / "moved.png").is_file()
    old = (config().out / "a.png").read_bytes()
    again = run(config(write("a", seed=1)))["a"]
    assert len(judged) == 2 and again["transfer"] != row["transfer"]
    assert (config().out / "a.png").read_bytes() != old
    # The same weights, but trained as another recipe has it: targets may look different to it
    assert run(config(write("a", seed=1, record={})))["a"]["recipe"] == {} and len(judged) == 3


# What is refused


def test_another_comparison_is_refused(write: Write, config: Configured) -> None:
    made = config(write("a"))
    run(made)
    before = (made.out / "report.json").read_bytes()
    for changes in ({"seed": 1}, {"targets": 2}, {"held_out": 3}):
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
    tiny_mapper: Path, write: Write, config: Configured, judged: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"{tiny_mapper} was trained for generator"):
        run(config(write("a"), tiny_mapper))
    assert judged == []


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
    with pytest.raises(ValueError, match=r"--world: expected .* of 64 px.*, found one of 16 px"):
        run(config(tiny_mapper, world=str(tiny_world)))


def test_a_damaged_report_is_refused(write: Write, config: Configured) -> None:
    made = config(write("a"))
    made.out.mkdir()
    (made.out / "report.json").write_text('{"comparison": ')
    with pytest.raises(ValueError, match=r"report\.json' is damaged .*: delete it"):
        run(made)


def test_an_error_is_one_line_and_exit_code_one(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--out", str(tmp_path), "--world", str(world), "--mappers", "nowhere.safetensors"]
    monkeypatch.setattr(sys, "argv", ["ablation", *arguments])
    with pytest.raises(SystemExit) as ended:
        ablation.main()
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: nowhere.safetensors") and error.count("\n") == 1
