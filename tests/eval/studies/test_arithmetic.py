"""The study of arithmetic: which targets are mixed, what is kept where edits add up, and a run."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.illustrated.codes import ATTRIBUTES, one_hot
from eval.judging import face_reader
from eval.metrics import essence_columns
from eval.reader import NAMES, OUTPUTS, PRESENT, SPANS, AvatarReader, with_presence
from eval.sets import EvalSet, study_set
from eval.studies import arithmetic
from eval.studies.arithmetic import (
    ADDED,
    BARE,
    COLOUR,
    HALF,
    LESS,
    MIXTURES,
    NAMED,
    NAMES_OF,
    PARTS,
    SUBTRACTED,
    SUM,
    THERE_AND_BACK,
    WORDS,
    Config,
    Setup,
    column,
    difference_rows,
    mixture_rows,
    pairs_of,
    run,
    shows,
    without,
)
from eval.truth import Truth
from predictor.direction import Direction
from predictor.transfer import EssenceTransfer
from targetclip.scene import Scene


@pytest.fixture(scope="module")
def targets() -> EvalSet:
    return study_set(96)


@pytest.fixture(scope="module")
def truth(targets: EvalSet) -> Truth:
    assert targets.truth is not None
    return targets.truth


# Targets


@pytest.mark.parametrize("kind", BARE)
def test_an_attribute_is_there_or_is_not(kind: str, truth: Truth) -> None:
    there, absent = shows(truth, kind, True), shows(truth, kind, False)
    assert there.any() and absent.any() and not (there & absent).any()
    for content, has in zip(truth.contents, there, strict=True):
        if isinstance(content, tuple):
            place = NAMES.index(PRESENT[kind][0])
            assert has == (ATTRIBUTES[place].values[content[place]] in PRESENT[kind][1])
        else:
            assert has == bool(getattr(content, kind))


@pytest.mark.parametrize("kinds", MIXTURES)
def test_each_of_a_pair_has_what_the_other_lacks(kinds: tuple[str, str], truth: Truth) -> None:
    one, other = kinds
    pairs = pairs_of(truth, one, other, 100)
    assert pairs and len({row for pair in pairs for row in pair}) == 2 * len(pairs)
    assert pairs_of(truth, one, other, 1) == pairs[:1]
    for first, second in pairs:
        assert shows(truth, one, True)[first] and shows(truth, other, False)[first]
        assert shows(truth, other, True)[second] and isinstance(truth.contents[second], tuple)
        if one == COLOUR:
            assert column(truth, first, one) != column(truth, second, one)
        else:
            assert shows(truth, one, False)[second]


def test_a_face_without_something_is_the_same_else(truth: Truth) -> None:
    face = next(content for content in truth.contents if isinstance(content, tuple))
    for kind in BARE:
        bare = without(face, kind)
        place = NAMES.index(PRESENT[kind][0])
        assert ATTRIBUTES[place].values[bare[place]] not in PRESENT[kind][1]
        assert [v for i, v in enumerate(bare) if i != place] == [
            v for i, v in enumerate(face) if i != place
        ]


# What is kept


class Additive(EssenceTransfer):
    """Reads latents as readings; a direction adds 1 where its target has something, and takes
    `lacks` where it has none."""

    def __init__(self, targets: EvalSet, lacks: float) -> None:
        assert targets.truth is not None
        self.scene: Any = SimpleNamespace(render=lambda ws: ws)
        pairs = zip(targets.pictures, targets.truth.readings, strict=True)
        self.known = {id(picture): readings for picture, readings in pairs}
        self.lacks = lacks

    def direction(
        self, target: Any = None, mode: Any = "auto", *_: Any, text: str | None = None, **__: Any
    ) -> Direction:
        readings = self.known.get(id(target))
        if text is not None:
            readings = torch.zeros(OUTPUTS)
            [kind] = [kind for kind, words in NAMES_OF.items() if words == text]
            readings[SPANS[kind].start + 1] = 1
        elif readings is None:  # a face, drawn as its numbers
            face = torch.from_numpy(np.asarray(target)[:1, :, 0].astype(np.int64))
            readings = with_presence(one_hot(face))[0]
        vector = torch.where(readings == 1, 1.0, -self.lacks)
        return Direction(vector=vector[None], method="mapper")

    def only_named(self, direction: Direction) -> Direction:
        return Direction(vector=direction.vector.clamp_min(0), method="mapper")


class Reads(AvatarReader):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[:, 0], images[:, 0]


@pytest.fixture
def setup(targets: EvalSet, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Setup]:
    def drawn(face: Any) -> tuple[Any, dict[str, str]]:
        return np.repeat(np.array(face, np.uint8)[None, :, None], 3, axis=2), {}

    monkeypatch.setattr(arithmetic, "draw_face", drawn)

    def made(lacks: float) -> Setup:
        essence, reader = Additive(targets, lacks), Reads()
        people = torch.rand(4, 1, OUTPUTS, generator=torch.Generator().manual_seed(0))
        sources = torch.where(essence_columns(), 0.0, people)
        for kind in BARE:
            sources[:2, :, SPANS[kind].start + 1] = 1.0
        before = arithmetic.readings_of(essence, reader, sources)
        return Setup(
            essence=essence,
            reader=reader,
            targets=targets,
            truth=truth,
            sources=sources,
            before=before,
        )

    return made


def test_a_sum_keeps_all_where_targets_say_only_what_they_have(
    setup: Callable[..., Setup],
) -> None:
    rows = list(mixture_rows(setup(lacks=0.0), 3, 0))
    assert len(rows) == 3 * 5 * 2 and {row["order"] for row in rows} == {0.0}
    for row in rows:
        assert row["alone"]["mean"] == 1 and row["pairs"] == 3
        assert row["kept"]["mean"] == (0 if row["way"] == HALF else 1)
        assert row["mixed"]["mean"] == row["kept"]["mean"]


def test_a_sum_keeps_nothing_where_a_target_takes_what_it_lacks(
    setup: Callable[..., Setup],
) -> None:
    for row in mixture_rows(setup(lacks=1.0), 3, 0):
        assert row["alone"]["mean"] == 1
        # Less the same face without, the second takes nothing and keeps what it brings. Words take
        # nothing either, and bring more than the first takes. All of it is in coarse layers here,
        # which are those of the second target.
        second = row["way"] == PARTS and not row["mixture"].startswith(row["attribute"])
        assert row["kept"]["mean"] == (row["way"] in (LESS, WORDS) or second)
    kept = [r["kept"]["mean"] for r in mixture_rows(setup(lacks=0.4), 3, 0) if r["way"] == SUM]
    assert set(kept) == {1.0}


@pytest.mark.parametrize("lacks", [0.0, 1.0])
def test_a_difference_takes_away_and_brings_where_edits_add_up(
    lacks: float, setup: Callable[..., Setup]
) -> None:
    rows = {(row["attribute"], row["way"]): row for row in difference_rows(setup(lacks), 2, 0)}
    for kind in BARE:
        for way in (SUBTRACTED, NAMED, ADDED, THERE_AND_BACK):
            assert rows[kind, way]["share"]["mean"] == 1
            assert rows[kind, way]["faces"] == (1 if way == NAMED else 2)


# The command


def test_a_run_reports_both_kinds(
    face_world: Path, write_mapper: Callable[..., Path], scene: Scene, tmp_path: Path
) -> None:
    mapper = write_mapper(tmp_path / "mapper.safetensors", {})
    config = Config(
        out=tmp_path / "out", world=str(face_world), mapper=mapper, targets=48, pairs=1, sources=3
    )
    report = run(config)
    assert json.loads((config.out / "report.json").read_text())["mixtures"] == report["mixtures"]
    assert {row["mixture"] for row in report["mixtures"]} == {" + ".join(k) for k in MIXTURES}
    text = (config.out / "report.md").read_text()
    assert "| glasses + hat | sum | hat | 1 |" in text
    before = face_reader(scene).read(scene.render(scene.sources(3, 1)))[1]
    has = {kind for kind in BARE if (before[:, SPANS[kind].start + 1] > 0.5).any()}
    assert {r["attribute"] for r in report["differences"] if r["way"] == SUBTRACTED} == has
    with pytest.raises(ValueError, match="--sources: expected 2 or more"):
        run(Config(out=tmp_path, world=str(face_world), mapper=mapper, sources=1))
