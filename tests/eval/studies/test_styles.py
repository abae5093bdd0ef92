"""The study of styles at a size that takes seconds: targets, rows, tables and refusals."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.illustrated.shown import Shown
from eval.reader import HAIR_COLOURS
from eval.studies.styles import KINDS, Config, has, mean_row, row_of, run, style_target

STYLES = ("avataaars", "big-ears", "personas")


@pytest.fixture(scope="module")
def mapper(write_mapper: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mapper(tmp_path_factory.mktemp("mapper") / "mapper.safetensors", {})


def configured(world: Path, mapper: Path | None, out: Path, **changes: Any) -> Config:
    small: dict[str, Any] = {"styles": STYLES, "count": 3, "sources": 2}
    return Config(**{"out": out, "world": str(world), "mapper": mapper, **small, **changes})


def test_targets_have_each_thing_in_turn_as_far_as_their_style_draws_it() -> None:
    for index in range(8):
        shown = style_target("personas", 1, index).shown
        for bit, kind in enumerate(KINDS):
            assert bool(getattr(shown, kind)) == bool(index >> bit & 1), (index, kind)
    assert not style_target("big-ears", 1, 7).shown.glasses
    first, again, other = (style_target("personas", seed, 0).picture for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_colours_of_hair_come_with_and_without_glasses_and_beard() -> None:
    targets = [
        style_target("avataaars", 1, index).shown for index in range(0, 400) if index % 8 < 4
    ]
    for colour in HAIR_COLOURS:
        alike = [target for target in targets if target.hair_colour == colour]
        assert len(alike) > 5
        for kind in ("glasses", "beard"):
            assert {bool(getattr(target, kind)) for target in alike} == {True, False}


def test_a_moustache_alone_leaves_open_if_it_is_a_beard() -> None:
    assert has(Shown(moustache="moustache"), "beard") is None
    assert has(Shown(moustache="moustache", beard="goatee"), "beard") is True
    assert has(Shown(), "beard") is False


def test_a_row_counts_what_arrives_with_and_without() -> None:
    targets = [Shown(glasses="glasses", hair_colour="pink"), Shown(hat="cap")]
    pink = HAIR_COLOURS.index("pink")
    found = {
        "glasses": torch.tensor([[True, True], [True, False]]),
        "beard": torch.zeros(2, 2, dtype=torch.bool),
        "hat": torch.tensor([[False, False], [True, True]]),
        "hair_colour": torch.tensor([[pink, 0], [pink, pink]]),
    }
    row = row_of(targets, found)
    assert (row["glasses_with"], row["glasses_without"]) == (1.0, 0.5)
    assert (row["glasses_difference"], row["hat_difference"]) == (0.5, 1.0)
    assert row["beard_with"] is row["beard_without"] is row["beard_difference"] is None
    assert row["hair_colour"] == 0.5  # of the one target that shows its hair
    assert row_of(targets[1:], {k: v[1:] for k, v in found.items()})["hair_colour"] is None


def test_means_are_over_the_styles_that_tell() -> None:
    rows = [{"a": 1.0, "b": None}, {"a": 0.0, "b": 0.25}]
    assert mean_row(rows) == {"a": 0.5, "b": 0.25} and mean_row(rows[:1])["b"] is None


def test_every_style_has_its_row_and_every_group_its_mean_and_its_sheet(
    face_world: Path, mapper: Path, tmp_path: Path
) -> None:
    config = configured(face_world, mapper, tmp_path / "out")
    with redirect_stdout(StringIO()) as printed:
        report = run(config)
    assert set(report["styles"]) == set(STYLES)
    assert json.loads((config.out / "report.json").read_text()) == json.loads(json.dumps(report))
    lines = (config.out / "report.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[2:] == [
        "unedited", "avataaars", "big-ears", "**trained, mean**", "personas", "**held-out, mean**",
    ]  # fmt: skip
    assert all(line in lines for line in printed.getvalue().splitlines() if "|" in line)
    for group in ("trained", "held-out"):
        with Image.open(config.out / f"{group}.png") as sheet:
            assert sheet.width > 3 * 256 and sheet.height > 9 * 256
    # A style that was judged is not judged again; another mapper's report is refused.
    report["styles"]["avataaars"]["targets"] = -1
    (config.out / "report.json").write_text(json.dumps(report))
    with redirect_stdout(StringIO()):
        assert run(config)["styles"]["avataaars"]["targets"] == -1
    with pytest.raises(ValueError, match="another comparison"):
        run(replace(config, one_direction=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"styles": ("persona",)}, "--styles: expected .* did you mean 'personas'"),
        ({"count": 0}, "--count: expected 1 or more, found 0"),
        ({"mapper": None}, "there is no mapper"),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, face_world: Path, mapper: Path, tmp_path: Path
) -> None:
    config = configured(face_world, mapper, tmp_path / "out")
    with pytest.raises(ValueError, match=message) as caught:
        run(replace(config, **changes))
    assert "\n" not in str(caught.value) and not config.out.exists()
