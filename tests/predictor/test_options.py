"""What the command line's options exclude, and what they mean together."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from predictor import cli
from predictor.load import load_essence
from predictor.options import OF_OPTIMIZER, Optimize, Options, Transfer, applied
from predictor.transfer import EssenceTransfer
from targetclip.world import load_world

GIVEN: dict[str, Any] = {"recipe": "paper", "initial": "zero", "steps": 9, "patience": 2}
FINDING = {**GIVEN, "weights": (1.0,), "mode": "auto", "mapper": Path("m")}


def transfer(**changes: Any) -> Transfer:
    return Transfer(**{"target": (Path("t.png"),), "out": Path("out"), **changes})


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"direction": Path("d"), k: v}, f"--{k} is for finding") for k, v in FINDING.items()),
    *(({"mode": "instant", k: v}, f"--{k} is the optimizer's") for k, v in GIVEN.items()),
    *(({"mapper": Path("m"), k: v}, f"--{k} and --mapper need a mode") for k, v in GIVEN.items()),
    *(({"mode": "refine", k: GIVEN[k]}, f"--{k}: a refinement") for k in ("initial", "steps")),
    ({"mode": "optimize", "mapper": Path("m")}, "--mode optimize asks no mapper"),
    ({"target": ()}, "--target PICTURE or --text TEXT"),
    ({"weights": ()}, "--weights: expected 1, one for each target, found 0"),
    ({"weights": (1.0,), "text": ("green hair",)}, "--weights: expected 2"),
    ({"weights": (float("nan"),)}, "--weights: expected a number within 100 of 0, found nan"),
    ({"weights": (0.0,)}, "--weights: expected one that is not 0"),
    *(({name: float("inf")}, f"--{name}: ") for name in ("strength", "coarse", "middle", "fine")),
    *(({"identity_floor": floor}, "from -1 to 1") for floor in (1.01, -2.0, float("nan"))),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_options_that_exclude_each_other_are_refused_in_one_line(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        transfer(**changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "refine", "recipe": "paper", "patience": 2, "mapper": Path("m")},
        {"mode": "auto", **GIVEN, "mapper": Path("m")},
        {"target": (), "text": ("green hair",)},
        {"direction": Path("d"), "identity_floor": -1.0, "strength": -100.0, "fine": 0.0},
    ],
)
def test_options_that_fit_are_taken(changes: dict[str, Any]) -> None:
    assert dataclasses.asdict(transfer(**changes)).items() >= changes.items()


@pytest.mark.parametrize("pictures", [0, 1, 4])
def test_weights_are_all_the_same_and_one_together_unless_given(pictures: int) -> None:
    paths = tuple(Path(f"{i}.png") for i in range(pictures))
    options = transfer(target=paths, text=("green hair", "a hat"))
    assert options.target_weights() == pytest.approx([1 / (pictures + 2)] * (pictures + 2))
    weights = (1.0, -0.5, *range(pictures))
    assert dataclasses.replace(options, weights=weights).target_weights() == weights


def test_a_report_says_how_a_direction_was_changed_and_nothing_of_what_was_not() -> None:
    assert applied(transfer(strength=2.0)) == {}
    assert applied(transfer(fine=0.0, identity_floor=0.0)) == {"fine": 0.0, "identity_floor": 0.0}


@pytest.fixture(scope="module")
def essences(tiny_world: Path, tiny_mapper: Path) -> dict[bool, EssenceTransfer]:
    """With a mapper and without."""
    world, device = load_world(str(tiny_world)), torch.device("cpu")
    return {True: load_essence(world, device, tiny_mapper), False: load_essence(world, device)}


@pytest.mark.parametrize("mapper", [True, False])
def test_a_mode_that_is_asked_for_is_used_and_the_optimizers_options_ask_for_it(
    essences: dict[bool, EssenceTransfer], mapper: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Options, str]] = [
        *((transfer(mode=mode), mode) for mode in ("instant", "auto", "refine", "optimize")),
        *((transfer(**{name: GIVEN[name]}), "optimize") for name in OF_OPTIMIZER),
        (transfer(mode="auto", steps=9), "auto"),
        (Optimize(target=(Path("t.png"),), out=Path("out")), "optimize"),
    ]
    for options, mode in asked:
        assert cli.choose_mode(options, essences[mapper]) == mode
    assert not capsys.readouterr().err


def test_the_mode_is_auto_where_there_is_a_mapper_and_else_the_optimizer_as_is_said(
    essences: dict[bool, EssenceTransfer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.choose_mode(transfer(), essences[True]) == "auto"
    assert not capsys.readouterr().err
    assert cli.choose_mode(transfer(), essences[False]) == "optimize"
    assert "no mapper" in capsys.readouterr().err
