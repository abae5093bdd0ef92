"""What the command line's options exclude, and what they and a world amount to."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from command_runs import transfer

from predictor.cli.flags import InversionFlags, Optimize, SearchFlags
from predictor.cli.options import OF_OPTIMIZER, Request, check_finding, resolve
from predictor.cli.report import edit_facts
from targetclip.recipes import RECIPES

GIVEN: dict[str, Any] = {"recipe": "paper", "initial": "zero", "steps": 9, "patience": 2}
GIVEN |= {"render_size": 8}
FINDING = {**GIVEN, "weights": (1.0,), "mode": "auto", "mapper": Path("m")}


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"direction": Path("d"), k: v}, f"{flag(k)} is for finding") for k, v in FINDING.items()),
    *(({"mode": "instant", k: v}, f"{flag(k)} is the optimizer's") for k, v in GIVEN.items()),
    *(
        ({"mapper": Path("m"), k: v}, f"{flag(k)} and --mapper need a mode")
        for k, v in GIVEN.items()
    ),
    *(({"mode": "refine", k: GIVEN[k]}, f"--{k}: a refinement") for k in ("initial", "steps")),
    ({"mode": "optimize", "mapper": Path("m")}, "--mode optimize asks no mapper"),
    *(
        ({"keep_identity": 0.5, k: v}, f"{flag(k)} and --keep-identity need a mode")
        for k, v in GIVEN.items()
    ),
    ({"direction": Path("d"), "keep_identity": 0.5}, "--keep-identity is for finding"),
    ({"mode": "optimize", "keep_identity": 0.5}, "--keep-identity: --mode optimize asks no mapper"),
    ({"keep_identity": 0.5}, "has no mapper that could read it: give --mapper"),
    *(({"keep_identity": keep}, "from 0 to 1, found") for keep in (-0.1, 1.5, float("nan"))),
    ({"mode": "optimize", "one_direction": True}, "--one-direction: the optimizer finds no other"),
    ({"target": ()}, "--target PICTURE or --text TEXT"),
    ({"weights": (1.0, 2.0)}, "--weights: expected 1, one for each target, found 2"),
    ({"mix": True}, "--mix: expected two targets or more, found 1"),
    ({"mix": True, "direction": Path("d")}, "--mix is for finding"),
    ({"weights": (1.0,), "text": ("green hair",)}, "--weights: expected 2"),
    ({"weights": (float("nan"),)}, "--weights: expected a number within 100 of 0, found nan"),
    ({"weights": (0.0,)}, "--weights: expected one that is not 0"),
    ({"strength": float("inf")}, "--strength: "),
    *(({name: (float("inf"),)}, f"--{name}: ") for name in ("coarse", "middle", "fine")),
    ({"coarse": ()}, "--coarse: expected a number, found none"),
    (
        {"fine": (1.0, 0.0)},
        "--fine: expected 1 factor, or one for each target of a mixture (--mix), found 2",
    ),
    ({"middle": (1.0, 0.0), "weights": (1.0,)}, "--middle: expected 1 factor, found 2"),
    *(({"identity_floor": floor}, "from -1 to 1") for floor in (1.01, -2.0, float("nan"))),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_options_that_exclude_each_other_are_refused_in_one_line(
    changes: dict[str, Any], said: str, tiny_world: Path, faces: list[Path]
) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(transfer(**{"target": (faces[0],), "world": str(tiny_world), **changes}))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "refine", "recipe": "paper", "patience": 2, "mapper": Path("m")},
        {"mode": "auto", **GIVEN, "mapper": Path("m")},
        {"target": (), "text": ("green hair",)},
        {"direction": Path("d"), "identity_floor": -1.0, "strength": -100.0, "fine": (0.0,)},
    ],
)
def test_options_that_fit_are_taken(changes: dict[str, Any]) -> None:
    options = transfer(**changes)
    check_finding(options)
    taken = {k: v for group in vars(options).values() for k, v in vars(group).items()}
    assert taken.items() >= changes.items()


# With a world


@pytest.fixture
def worlds(tiny_world: Path, tiny_mapper: Path) -> dict[bool, str]:
    """With a mapper and neutral texts, and without."""
    path = tiny_world.with_name("with_mapper.toml")
    more = f'mapper = "{tiny_mapper}"\nneutral = ["a face"]\n'
    path.write_text(tiny_world.read_text() + more)
    return {True: str(path), False: str(tiny_world)}


@pytest.fixture
def picture(faces: list[Path]) -> tuple[Path, ...]:
    return (faces[0],)


def test_a_request_has_the_worlds_defaults(
    worlds: dict[bool, str], picture: tuple[Path, ...]
) -> None:
    request = resolve(transfer(target=picture, world=worlds[True]))
    assert (request.recipe_name, request.recipe) == ("consistent", RECIPES["consistent"])
    assert (request.strength, request.num_sources, request.weights) == (1.0, 6, (1.0,))
    assert (request.align, request.invert_steps, request.inverts) == (False, 0, False)
    assert request.mapper is not None and request.precision == "fp32"


def test_what_is_given_goes_before_the_worlds_defaults(
    worlds: dict[bool, str], tiny_mapper: Path, faces: list[Path]
) -> None:
    changes: dict[str, Any] = {"sources": (faces[1],), "align": True, "invert_steps": 5}
    changes |= {"strength": 0.0, "mapper": tiny_mapper, "face": 2}
    common: dict[str, Any] = {"target": (faces[0],), "world": worlds[True]}
    request = resolve(transfer(**common, **changes))
    assert {name: getattr(request, name) for name in changes} == changes and request.inverts
    steps = resolve(transfer(**common, **{**changes, **GIVEN, "mapper": None})).recipe
    expected = {name: value for name, value in GIVEN.items() if name != "recipe"}
    assert steps == dataclasses.replace(RECIPES["paper"], **expected)


@pytest.mark.parametrize("pictures", [0, 1, 4])
def test_pictures_of_a_mixture_share_a_whole_and_texts_have_1_unless_weights_are_given(
    worlds: dict[bool, str], faces: list[Path], pictures: int
) -> None:
    given: dict[str, Any] = {
        "target": (faces[0],) * pictures, "text": ("green hair", "a hat"), "world": worlds[True]
    }  # fmt: skip
    request = resolve(transfer(**given, mix=True))
    shares = [1 / pictures] * pictures if pictures else []
    assert request.weights == pytest.approx([*shares, 1, 1])
    weights = (1.0, -0.5, *range(pictures))
    mixed = resolve(transfer(**given, weights=weights))
    assert mixed.weights == weights and not mixed.separate
    alone = resolve(transfer(**given))
    assert alone.separate and alone.weights == (1.0,) * (pictures + 2)


def test_a_direction_file_is_scored_against_several_targets_in_one_result(
    worlds: dict[bool, str], faces: list[Path], direction_file: Path
) -> None:
    options = transfer(target=tuple(faces), world=worlds[True], direction=direction_file)
    assert not resolve(options).separate


def test_a_report_says_how_a_direction_was_changed_and_nothing_of_what_was_not(
    who_world: Path, picture: tuple[Path, ...]
) -> None:
    def facts(**changes: Any) -> dict[str, Any]:
        return edit_facts(resolve(transfer(target=picture, world=str(who_world), **changes)))

    assert facts(strength=2.0) == {}
    assert facts(fine=(0.0,), identity_floor=0.0) == {"fine": 0.0, "identity_floor": 0.0}


def test_a_mode_that_is_given_is_used_and_the_optimizers_options_ask_for_it(
    worlds: dict[bool, str], picture: tuple[Path, ...], direction_file: Path
) -> None:
    def mode_of(**changes: Any) -> str | None:
        return resolve(transfer(target=picture, world=worlds[True], **changes)).mode

    for mode in ("instant", "auto", "refine", "optimize"):
        assert mode_of(mode=mode) == mode
    for name in OF_OPTIMIZER:
        assert mode_of(**{name: GIVEN[name]}) == "optimize"
    assert mode_of(mode="auto", steps=9) == "auto"
    assert mode_of(direction=direction_file) is None


def test_the_mode_is_auto_where_there_is_a_mapper_and_else_the_optimizer(
    worlds: dict[bool, str], picture: tuple[Path, ...]
) -> None:
    def asked(mapper: bool, **changes: Any) -> Request:
        return resolve(transfer(target=picture, world=worlds[mapper], **changes))

    assert (asked(True).mode, asked(True).falls_back) == ("auto", False)
    assert (asked(False).mode, asked(False).falls_back) == ("optimize", True)
    assert not asked(False, steps=9).falls_back and not asked(False, mode="optimize").falls_back
    with pytest.raises(ValueError, match="--mode instant: world 'tiny' has no mapper"):
        asked(False, mode="instant")


@pytest.mark.parametrize("mapper", [True, False])
def test_optimize_is_a_transfer_by_the_optimizer(
    worlds: dict[bool, str], picture: tuple[Path, ...], mapper: bool
) -> None:
    options = transfer(target=picture, world=worlds[mapper], mode="optimize")
    request = resolve(
        Optimize(
            target=options.target,
            source=InversionFlags(),
            search=SearchFlags(),
            output=options.output,
            machine=options.machine,
        )
    )
    same = dataclasses.replace(resolve(options), command="optimize")
    assert request == same and not request.falls_back


@pytest.mark.parametrize(
    ("changes", "inverts"),
    [
        ({"initial": "inversion"}, True),
        ({"initial": "inversion", "mode": "auto"}, True),
        ({"recipe": "release", "mode": "refine"}, False),
        ({"recipe": "release"}, True),
        ({"initial": "zero"}, False),
        ({}, False),
    ],
)
def test_a_target_is_inverted_where_a_search_may_start_there(
    worlds: dict[bool, str], picture: tuple[Path, ...], changes: dict[str, Any], inverts: bool
) -> None:
    request = resolve(transfer(target=picture, world=worlds[True], **changes))
    assert request.inverts_target is request.inverts is inverts
