"""The challenge set that ships: whole, spread, drawn by its command, and of seeds of its own."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.illustrated import challenge
from data.illustrated.avatars import HELD_OUT, TRAINED
from data.illustrated.challenge import (
    SOURCES,
    Config,
    Plan,
    plans,
    png,
    run,
    source,
    source_face,
    target,
)
from data.illustrated.codes import W_DIM, indices_from_z
from data.illustrated.shown import colours
from targetclip import seeds
from targetclip.media.images import read_picture
from train.world.generator import HELD_OUT_SEED
from train.world.generator import Config as GeneratorConfig

FOLDER = Path(__file__).parents[3] / "data" / "challenge"
EVERY = 13  # target that is drawn again


def truth() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((FOLDER / "targets" / "truth.json").read_text())
    return found


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.int16) - np.asarray(b.convert("RGB"), np.int16)).mean())


def test_every_file_is_as_it_was_drawn_and_none_is_left_out() -> None:
    lines = (FOLDER / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for name, digest in sums.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    there = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*") if p.is_file()}
    assert there - {*sums} == {"README.md", "SHA256SUMS"}
    assert sum((FOLDER / name).stat().st_size for name in there) < 1_500_000


def test_it_has_sixty_four_targets_of_all_styles_and_sixteen_sources() -> None:
    rows = truth()
    targets = sorted((FOLDER / "targets").glob("*.png"))
    assert {path.name for path in targets} == {*rows} and len(rows) == 64
    assert {read_picture(path).size for path in targets} == {(256, 256)}
    sizes = [read_picture(path).size for path in (FOLDER / "sources").glob("*.png")]
    assert sizes == [(128, 128)] * SOURCES == [(128, 128)] * 16
    styles = Counter(row["style"] for row in rows.values())
    assert styles == dict.fromkeys(TRAINED, 4) | dict.fromkeys(HELD_OUT, 5)
    assert all(row["held_out"] == (row["style"] in HELD_OUT) for row in rows.values())
    licences = (FOLDER / "LICENCES.md").read_text()
    assert all(f"| {style} | " in licences for style in styles)


@pytest.mark.parametrize("held_out", [False, True])
def test_what_targets_show_is_spread(held_out: bool) -> None:
    rows = [row for row in truth().values() if row["held_out"] == held_out]
    for kind in ("glasses", "beard", "hat"):
        assert 0.2 < sum(bool(row[kind]) for row in rows) / len(rows) < 0.6, kind
    seen = Counter(row["hair_colour"] for row in rows if row["hair_colour"])
    assert max(seen.values()) <= 5 and len(seen) >= (8 if held_out else 12)
    assert {*seen} <= {*colours()}


def test_the_command_draws_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = plans()[::EVERY]
    monkeypatch.setattr(challenge, "plans", lambda: few)
    monkeypatch.setattr(challenge, "SOURCES", 2)
    run(Config(out=tmp_path))
    (tmp_path / "other.txt").touch()
    run(Config(out=tmp_path))
    assert (tmp_path / "other.txt").exists()
    made = json.loads((tmp_path / "targets" / "truth.json").read_text())
    assert made == {name: row for name, row in truth().items() if name in made}
    assert len(made) == len(few) == 5
    for name in [*(f"targets/{one}" for one in made), "sources/source-01.png"]:
        # Rounding, and the choice of 256 colours, may differ from one machine to the next.
        assert difference(read_picture(FOLDER / name), read_picture(tmp_path / name)) < 2
    assert (tmp_path / "LICENCES.md").read_bytes() == (FOLDER / "LICENCES.md").read_bytes()


def test_a_small_file_shows_the_same_picture(tmp_path: Path) -> None:
    for picture in (source(0), target(plans()[0])[0]):
        (tmp_path / "a.png").write_bytes(png(picture))
        assert difference(picture, read_picture(tmp_path / "a.png")) < 2


# Nothing has learned from it


def test_its_seed_is_nobody_elses() -> None:
    others = [v for k, v in vars(seeds).items() if type(v) is int and k != "CHALLENGE"]
    others += [HELD_OUT_SEED, GeneratorConfig(out=Path()).seed]
    assert len(others) > 10 and seeds.CHALLENGE not in others
    assert len({(plan.style, plan.index) for plan in plans()}) == 64


def test_its_sources_are_not_among_the_faces_that_networks_learned_or_were_chosen_by() -> None:
    config = GeneratorConfig(out=Path())
    mine = torch.tensor([source_face(i) for i in range(SOURCES)])
    assert len(mine.unique(dim=0)) == SOURCES
    for seed, count in ((config.seed, config.faces), (HELD_OUT_SEED, 512)):
        numbers = torch.Generator().manual_seed(seed)
        known = indices_from_z(torch.randn(count, W_DIM, generator=numbers))
        assert not (known[:, None] == mine[None]).all(dim=2).any()


def test_a_plan_forces_what_its_style_can_show() -> None:
    for plan in plans():
        assert isinstance(plan, Plan)
        row = truth()[f"{plan.name}.png"]
        for kind, on in plan.wishes.items():
            shows = row[kind] or (kind == "beard" and row["moustache"])
            assert bool(shows) == on, plan
