"""The comparison of recipes at a size that takes seconds: what it reports, and going on."""

import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.illustrated.codes import SIZE
from eval.judging import face_judges, goal_of
from eval.sets import study_set
from eval.studies.teachers import (
    Config,
    direction_scores,
    families,
    family_charts,
    family_of,
    report_table,
    run,
    variants,
)
from targetclip.recipes import RECIPES
from targetclip.scene import Scene

SCORES = {
    "transfer",
    "transfer_in_range",
    "transfer_out_of_range",
    "consistency",
    "essence_in_range",
    "essence_out_of_range",
    "identity",
}
OTHERS = {"own_transfer", "norm", "seconds_per_target", "by_strength", "settings"}
TWICE = {"agreement", "again"}


def configured(world: Path, out: Path, **changes: Any) -> Config:
    """Two targets and two steps."""
    usual: dict[str, Any] = {"targets": 2, "held_out": 2, "max_steps": 2, "strengths": (0.5, 1.0)}
    return Config(**{"out": out, "world": str(world), **usual, **changes})


@pytest.fixture
def small(face_world: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations; nothing is optimized twice."""
    return partial(configured, world=face_world, out=tmp_path / "out", twice=False)


@pytest.fixture(scope="module")
def finished(face_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of the named recipes."""
    out = tmp_path_factory.mktemp("recipes") / "out"
    run(configured(face_world, out))
    return out


def names_run(config: Config) -> list[str]:
    """Run a comparison, and return the settings that were optimized, as they were printed."""
    with redirect_stdout(StringIO()) as printed:
        run(config)
    lines = printed.getvalue().splitlines()
    return [line[:22].strip() for line in lines if not line.startswith("left out")]


def read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def put(out: Path, report: Mapping[str, Any]) -> None:
    out.mkdir()
    (out / "report.json").write_text(json.dumps(report))


# The report


def test_every_setting_has_its_scores_and_a_sheet(finished: Path) -> None:
    report = read(finished)
    assert list(report) == ["comparison", "right answer", *RECIPES]
    assert report["right answer"].keys() == SCORES
    for name, recipe in RECIPES.items():
        figures = report[name]
        assert figures.keys() == SCORES | OTHERS | TWICE
        assert figures["again"].keys() == SCORES
        assert figures["settings"] == json.loads(json.dumps(asdict(replace(recipe, steps=2))))
        assert -1 <= figures["agreement"] <= 1 and figures["seconds_per_target"] > 0
        assert (finished / f"{name}.png").is_file()
    # Another bank and other random starts
    assert report["paper"]["again"] != {key: report["paper"][key] for key in SCORES}
    assert report["release"]["norm"] != report["paper"]["norm"]


def test_full_strength_is_one_of_the_strengths(finished: Path) -> None:
    for name in RECIPES:
        figures = read(finished)[name]
        assert list(figures["by_strength"]) == ["0.5", "1.0"]
        assert figures["by_strength"]["1.0"] == {key: figures[key] for key in SCORES}
        assert figures["by_strength"]["0.5"].keys() == SCORES
        assert figures["by_strength"]["0.5"]["identity"] != figures["identity"]


def test_scores_are_means_over_the_targets_at_every_strength(scene: Scene) -> None:
    judges, both, sources = face_judges(scene), study_set(2), scene.sources(2, seed=1)
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(2, *sources.shape[1:], generator=random)
    for strength in (0.0, 0.5, 1.0):
        together = direction_scores(judges, goal_of(judges, both), sources, directions, strength)
        alone = []
        for i in range(2):
            rows = slice(i, i + 1)
            goal = goal_of(judges, both.part(i, i + 1))
            alone.append(direction_scores(judges, goal, sources, directions[rows], strength))
        for key in ("transfer", "consistency", "identity"):
            mean = sum(scores[key] for scores in alone) / 2
            assert together[key] == pytest.approx(mean, abs=1e-5), key
        # The first target is in range, the second is not
        outside = alone[1]["transfer"]
        assert together["transfer_in_range"] == pytest.approx(alone[0]["transfer"], abs=1e-5)
        assert together["transfer_out_of_range"] == pytest.approx(outside, abs=1e-5)
        if strength == 0:
            assert together["identity"] == pytest.approx(1, abs=1e-5)
            assert together["essence_in_range"] == pytest.approx(0, abs=1e-5)


def test_the_table_has_a_row_a_setting(finished: Path) -> None:
    report = read(finished)
    del report["comparison"]
    lines = (finished / "report.md").read_text().splitlines()
    assert lines == report_table(report).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(report)
    assert {line.count("|") for line in lines} == {11}
    heads = [head.strip() for head in lines[0].split("|")]
    answer, paper = (lines[2 + list(report).index(name)] for name in ("right answer", "paper"))
    cells = [cell.strip() for cell in paper.split("|")]
    assert cells[heads.index("transfer score")] == f"{report['paper']['transfer']:.3g}"
    assert "" not in cells[1:-1]
    assert answer.split("|")[heads.index("length")].strip() == ""  # it has no direction


# Which settings, and going on


def test_a_comparison_goes_on_with_what_is_missing(
    finished: Path, small: Callable[..., Config]
) -> None:
    config, before = small(), read(finished)
    del before["paper"]
    put(config.out, before)
    assert names_run(config) == ["paper"]
    after = read(config.out)
    assert after["paper"]["settings"]["differences"] == "raw"
    assert {name: after[name] for name in before} == before
    assert "| paper |" in (config.out / "report.md").read_text()
    assert names_run(config) == [] and read(config.out) == after


def test_a_recipe_that_changed_since_is_run_again(
    finished: Path, small: Callable[..., Config]
) -> None:
    config, before = small(), read(finished)
    before["paper"]["settings"]["steps"] = 7
    put(config.out, before)
    assert names_run(config) == ["paper"]
    assert read(config.out)["paper"]["settings"]["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seed": 1}, "another comparison"), ({"only": ("paper", "peper")}, "found peper")],
)
def test_what_does_not_belong_together_is_refused(
    finished: Path, face_world: Path, changes: dict[str, Any], words: str
) -> None:
    before = (finished / "report.json").read_bytes()
    with pytest.raises(ValueError, match=words):
        run(configured(face_world, finished, **changes))
    assert (finished / "report.json").read_bytes() == before


def test_a_recipe_for_identity_is_left_out_where_there_is_no_identity_model(
    face_world: Path, small: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    without = face_world.with_name("without.toml")
    without.write_text(face_world.read_text().replace('identity = "identity.safetensors"\n', ""))
    config = small(world=without, max_steps=1, strengths=(1.0,))
    run(config)
    assert set(read(config.out)) == {"comparison", "right answer", *RECIPES} - {"identity"}
    assert "left out: identity: the world has no identity model" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs an identity model"):
        run(small(world=without, out=config.out.with_name("named"), only=("identity",)))


def test_a_report_from_before_a_setting_was_there_is_gone_on_with(
    finished: Path, small: Callable[..., Config]
) -> None:
    config, report = small(), read(finished)
    for name in RECIPES:
        if not RECIPES[name].identity_weight:
            del report[name]["settings"]["identity_weight"]
    put(config.out, report)
    assert names_run(config) == []


def test_only_the_settings_named_are_run_and_steps_are_cut(small: Callable[..., Config]) -> None:
    config = small(variants="all", only=("tied layers", "75 steps"), max_steps=1)
    assert names_run(config) == ["75 steps", "tied layers"]
    report = read(config.out)
    assert list(report)[1:] == ["right answer", "75 steps", "tied layers"]
    assert report["tied layers"]["settings"]["tied_layers"] is True
    assert report["tied layers"]["settings"]["steps"] == 1
    assert not TWICE & report["tied layers"].keys()
    sheets = sorted(path.name for path in config.out.glob("*.png"))
    assert sheets == ["75_steps.png", "tied_layers.png"]


def test_variants_differ_from_each_other() -> None:
    recipes = variants()
    assert RECIPES.items() <= recipes.items() and len(recipes) > len(RECIPES)
    settings = [json.dumps(asdict(recipe), sort_keys=True) for recipe in recipes.values()]
    assert len(set(settings)) == len(settings)


def test_half_of_the_targets_are_out_of_range_and_fewer_are_the_first_of_more() -> None:
    four, two = study_set(4), study_set(2)
    assert [picture.tobytes() for picture in four.pictures[:2]] == [
        picture.tobytes() for picture in two.pictures
    ]
    assert four.truth is not None and two.truth is not None
    assert torch.equal(four.truth.readings[:2], two.truth.readings)
    assert torch.equal(four.truth.seen[:2], two.truth.seen)
    assert all(picture.size == (SIZE, SIZE) for picture in four.pictures)
    assert len({picture.tobytes() for picture in four.pictures}) == 4


# Charts


def swept(identity: float, essence: float) -> dict[str, Any]:
    by_strength = {
        str(s): {"identity": identity / s, "essence_in_range": essence * s} for s in (0.5, 1.0)
    }
    return {"by_strength": by_strength}


def test_settings_that_change_the_same_thing_are_a_family() -> None:
    names = ["1 fixed source", "3 fresh sources", "decay 0", "75 steps"]
    assert [family_of(name) for name in names] == ["sources", "sources", "decay", "steps"]
    names = ["consistent", "1 fixed source", "decay 0", "3 fresh sources", "tied layers"]
    assert families(names) == {"sources": ["consistent", "1 fixed source", "3 fresh sources"]}


def test_every_family_has_a_chart_and_what_has_no_strengths_is_left_out() -> None:
    report = {
        "right answer": {"identity": 0.6},
        "consistent": swept(0.2, 0.6),
        "decay 0": swept(0.1, 0.7),
        "decay 1": swept(0.4, 0.1),
    }
    charts = family_charts(report)
    assert list(charts) == ["decay"] and isinstance(charts["decay"], Image.Image)
    moved = family_charts({**report, "decay 1": swept(0.4, 0.3)})
    assert moved["decay"].tobytes() != charts["decay"].tobytes()
    del report["consistent"]
    assert family_charts(report) == {}
