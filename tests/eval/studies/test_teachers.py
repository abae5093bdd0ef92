"""The comparison of recipes at a size that takes seconds: what it reports, and going on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.drawn.sketch import NAMES, SIZE
from eval.studies import teachers as recipes
from eval.studies.teachers import Config, draw_targets, judge, run, table, variants
from predictor.transfer import EssenceTransfer
from targetclip.encoders.identity import IdentityConfig, SketchIdentity, save_identity
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.recipes import RECIPES
from targetclip.world import load_parts, load_world

Z_DIM = 32  # a coordinate for each parameter of a face
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


@pytest.fixture(scope="module", autouse=True)
def small_bank() -> Iterator[None]:
    """A bank of eight sources, for all of it is embedded first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "BANK", 8)
        yield


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny world, but of the size that the reader of faces reads."""
    folder = tmp_path_factory.mktemp("tiny64")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(
                resolution=SIZE,
                w_dim=Z_DIM,
                z_dim=Z_DIM,
                mapping_layers=2,
                channels=(8, 8, 8, 8, 8),
            )
        )
        config = InverterConfig(
            resolution=SIZE,
            num_ws=generator.num_ws,
            w_dim=Z_DIM,
            generator=generator.fingerprint,
            channels=(8, 8, 8, 8),
            hidden=16,
        )
        save_inverter(Inverter(config), folder / "inverter.safetensors")
        identity = SketchIdentity(IdentityConfig(SIZE, (8, 8, 8, 8), 16, 5))
        save_identity(identity, folder / "identity.safetensors")
    save_safetensors(generator, folder / "generator.safetensors")
    path = folder / "world.toml"
    path.write_text(tiny_world.read_text() + 'identity = "identity.safetensors"\n')
    return path


def configured(world: Path, out: Path, **changes: Any) -> Config:
    """Two targets and two steps."""
    usual: dict[str, Any] = {"targets": 2, "held_out": 2, "max_steps": 2, "strengths": (0.5, 1.0)}
    return Config(**{"out": out, "world": str(world), **usual, **changes})


@pytest.fixture
def small(world: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations."""
    return partial(configured, world=world, out=tmp_path / "out")


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of the named recipes."""
    out = tmp_path_factory.mktemp("recipes") / "out"
    run(configured(world, out))
    return out


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Steps of the settings that are run from here on, in order; nothing is optimized twice."""
    steps: list[int] = []
    run_recipe = recipes.run_recipe

    def counted(essence: Any, recipe: Any, targets: Any, config: Any) -> Any:
        steps.append(recipe.steps)
        return run_recipe(essence, recipe, targets, replace(config, twice=False))

    monkeypatch.setattr(recipes, "run_recipe", counted)
    yield steps


def read(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


# The report


def test_every_setting_has_its_scores_and_a_sheet(finished: Path) -> None:
    report = read(finished)
    assert list(report) == ["comparison", "drawn answer", *RECIPES]
    assert report["drawn answer"].keys() == SCORES
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


def test_the_drawn_answer_has_the_essence_and_the_identity(finished: Path) -> None:
    answer, found = read(finished)["drawn answer"], read(finished)["paper"]
    assert min(answer["essence_in_range"], answer["identity"]) > 0.5
    assert answer["essence_in_range"] > found["essence_in_range"]


def test_scores_are_means_over_the_targets_at_every_strength(world: Path) -> None:
    named = load_world(str(world))
    parts = load_parts(named, torch.device("cpu"))
    essence = EssenceTransfer(
        parts.generator, parts.embedder, parts.inverter, truncation=named.truncation
    )
    sources = essence.generated_sources(2, seed=1)
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(2, *sources.shape[1:], generator=random)
    both = draw_targets(2)
    each = [
        replace(
            both,
            pictures=[both.pictures[i]],
            readings=both.readings[i : i + 1],
            seen=both.seen[i : i + 1],
        )
        for i in range(2)
    ]
    for strength in (0.0, 0.5, 1.0):
        together = judge(essence, both, sources, strength * directions)
        alone = [
            judge(essence, each[i], sources, strength * directions[i : i + 1]) for i in range(2)
        ]
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
    assert lines == table(report).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(report)
    assert {line.count("|") for line in lines} == {11}
    heads = [head.strip() for head in lines[0].split("|")]
    answer, paper = (lines[2 + list(report).index(name)] for name in ("drawn answer", "paper"))
    cells = [cell.strip() for cell in paper.split("|")]
    assert cells[heads.index("transfer score")] == f"{report['paper']['transfer']:.3g}"
    assert "" not in cells[1:-1]
    assert answer.split("|")[heads.index("length")].strip() == ""  # it has no direction


# Which settings, and going on


def test_a_comparison_goes_on_with_what_is_missing(
    finished: Path, small: Callable[..., Config], made: list[int]
) -> None:
    config = small()
    config.out.mkdir()
    before = read(finished)
    del before["paper"]
    (config.out / "report.json").write_text(json.dumps(before))
    run(config)
    after = read(config.out)
    assert len(made) == 1 and after["paper"]["settings"]["differences"] == "raw"
    assert {name: after[name] for name in before} == before
    assert "| paper |" in (config.out / "report.md").read_text()
    run(config)
    assert len(made) == 1 and read(config.out) == after


def test_a_recipe_that_changed_since_is_run_again(
    finished: Path, small: Callable[..., Config], made: list[int]
) -> None:
    config = small()
    config.out.mkdir()
    before = read(finished)
    before["paper"]["settings"]["steps"] = 7
    (config.out / "report.json").write_text(json.dumps(before))
    run(config)
    assert len(made) == 1 and read(config.out)["paper"]["settings"]["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seed": 1}, "another comparison"), ({"only": ("paper", "peper")}, "found peper")],
)
def test_what_does_not_belong_together_is_refused(
    finished: Path, world: Path, changes: dict[str, Any], words: str
) -> None:
    before = (finished / "report.json").read_bytes()
    with pytest.raises(ValueError, match=words):
        run(configured(world, finished, **changes))
    assert (finished / "report.json").read_bytes() == before


def test_a_recipe_for_identity_is_left_out_where_no_model_knows_who_is_seen(
    world: Path, made: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = world.with_name("without.toml")
    without.write_text(world.read_text().replace('identity = "identity.safetensors"\n', ""))
    run(configured(without, tmp_path / "out", twice=False))
    assert set(read(tmp_path / "out")) == {"comparison", "drawn answer", *RECIPES} - {"identity"}
    assert "left out: identity: the world has no identity model" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs an identity model"):
        run(configured(without, tmp_path / "named", only=("identity",)))


def test_a_report_from_before_a_setting_was_there_is_gone_on_with(
    finished: Path, world: Path, made: list[int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = read(finished)
    for name in RECIPES:
        if not RECIPES[name].identity_weight:
            del report[name]["settings"]["identity_weight"]
    (out / "report.json").write_text(json.dumps(report))
    run(configured(world, out))
    assert made == []


def test_only_the_settings_named_are_run_and_steps_are_cut(
    small: Callable[..., Config], made: list[int]
) -> None:
    config = small(variants="all", only=("tied layers", "75 steps"), max_steps=1)
    run(config)
    report = read(config.out)
    assert list(report)[1:] == ["drawn answer", "75 steps", "tied layers"] and made == [1, 1]
    assert report["tied layers"]["settings"]["tied_layers"] is True
    assert not TWICE & report["tied layers"].keys()
    sheets = sorted(path.name for path in config.out.glob("*.png"))
    assert sheets == ["75_steps.png", "tied_layers.png"]


def test_variants_differ_from_each_other() -> None:
    found = variants()
    assert RECIPES.items() <= found.items() and len(found) > len(RECIPES)
    settings = [json.dumps(asdict(recipe), sort_keys=True) for recipe in found.values()]
    assert len(set(settings)) == len(settings)


def test_half_of_the_targets_are_out_of_range_and_fewer_are_the_first_of_more() -> None:
    four, two = draw_targets(4), draw_targets(2)
    assert [picture.tobytes() for picture in four.pictures[:2]] == [
        picture.tobytes() for picture in two.pictures
    ]
    assert torch.equal(four.readings[:2], two.readings) and torch.equal(four.seen[:2], two.seen)
    assert all(picture.size == (SIZE, SIZE) for picture in four.pictures)
    assert len({picture.tobytes() for picture in four.pictures}) == 4 and len(NAMES) <= Z_DIM
