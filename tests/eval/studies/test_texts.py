"""Texts against pictures at a size that takes seconds: truths, reports and refusals."""

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import module_exit_code
from PIL import Image
from torch.nn import functional as F

from data.illustrated.avatars import draw
from data.illustrated.captions import Speaker, present_phrases
from data.illustrated.codes import ATTRIBUTES, HAIR_COLOURS, HAT_COLOURS, STYLE, options_of
from data.illustrated.shown import Shown, shown
from eval.metrics import essence_columns
from eval.reader import READINGS, SPANS
from eval.studies import texts
from eval.studies.texts import (
    BRIEF,
    COMPLETE,
    FACE,
    PHRASE,
    PHRASES,
    PICTURE,
    RAW,
    TEXT,
    Config,
    Setup,
    describe_faces,
    judge_targets,
    make_setup,
    run,
    truth_of_phrases,
)
from predictor.inputs import Text
from predictor.mapper import Mapper
from predictor.transfer import EssenceTransfer
from targetclip import seeds
from targetclip.world import load_world

NEUTRAL = 'neutral = ["a face", "a person"]\n'
WORN = {
    "hat": ("top", "hat"),
    "glasses": ("accessories", "round"),
    "beard": ("facialHair", "beardLight"),
}
TEXT_KINDS = [(kind, way) for kind in (COMPLETE, BRIEF, PHRASE) for way in (TEXT, RAW)]
KINDS = [(FACE, PICTURE), *TEXT_KINDS]


@pytest.fixture(scope="module")
def mapper(write_mapper: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mapper(tmp_path_factory.mktemp("mapper") / "mapper.safetensors", {})


def configured(world: Path, mapper: Path | None, out: Path, **changes: Any) -> Config:
    """Two faces and two sources."""
    usual: dict[str, Any] = {"count": 2, "sources": 2}
    return Config(**{"out": out, "world": str(world), "mapper": mapper, **usual, **changes})


@dataclass(frozen=True)
class Finished:
    """A comparison, its rows by kind and way, and what it printed."""

    out: Path
    rows: dict[tuple[str, str], dict[str, Any]]
    printed: str


@pytest.fixture(scope="module")
def finished(face_world: Path, mapper: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = configured(face_world, mapper, tmp_path_factory.mktemp("texts") / "out")
    with redirect_stdout(StringIO()) as printed:
        rows = run(config)
    found = {(row["kind"], row["way"]): row for row in rows}
    return Finished(config.out, found, printed.getvalue())


@pytest.fixture(scope="module")
def setup(face_world: Path, mapper: Path) -> Setup:
    return make_setup(configured(face_world, mapper, Path()), load_world(str(face_world)))


# Targets


def test_phrases_are_counted_by_what_they_name_and_nothing_else() -> None:
    truth = truth_of_phrases()
    assert not (truth.seen & ~essence_columns()).any()
    for place, named in enumerate(PHRASES.values()):
        counted = {r.name for r in READINGS if truth.seen[place, r.span].all()}
        touched = {r.name for r in READINGS if truth.seen[place, r.span].any()}
        assert counted == touched == set(named)
    readings = dict(zip(PHRASES, truth.readings, strict=True))
    green, red = readings["green hair"], readings["a red hat"]
    assert list(HAIR_COLOURS)[int(green[SPANS["hairColor"]].argmax())] == "green"
    assert list(HAT_COLOURS)[int(red[SPANS["hatColor"]].argmax())] == "red"
    assert red[SPANS["hat"]].tolist() == readings["glasses"][SPANS["glasses"]].tolist() == [0, 1]


def shown_by(named: dict[str, str]) -> Shown:
    """What a face with short black hair shows that has what a phrase names."""
    values = {"top": "shortFlat"} | dict(
        WORN.get(name, (name, value)) for name, value in named.items()
    )
    face = [a.values.index(values.get(a.name, a.values[0])) for a in ATTRIBUTES]
    return shown(STYLE, draw(STYLE, options_of(face))[1])


@pytest.mark.parametrize("phrase", PHRASES)
def test_captions_say_of_a_face_what_the_phrase_says(phrase: str) -> None:
    item, spoken = shown_by(PHRASES[phrase]), set[str]()
    for seed in range(30):
        speaker = Speaker(np.random.default_rng(seed))
        spoken |= set(" ".join(present_phrases(item, speaker, complete=False)).split())
    assert set(phrase.split()) - {"and"} <= spoken


def test_faces_are_of_this_study_alone_and_fewer_are_the_first_of_more() -> None:
    others = {value for name, value in vars(seeds).items() if name.endswith("_TARGETS")}
    assert len(others) == sum(name.endswith("_TARGETS") for name in vars(seeds))
    faces, few = describe_faces(3, seed=5), describe_faces(2, seed=5)
    assert [p.tobytes() for p in faces.pictures[:2]] == [p.tobytes() for p in few.pictures]
    assert {kind: captions[:2] for kind, captions in faces.captions.items()} == few.captions
    assert len({picture.tobytes() for picture in faces.pictures}) == 3
    assert torch.equal(faces.truth.readings[:2], few.truth.readings)


def test_the_seed_words_the_captions_and_leaves_the_faces() -> None:
    one, other = describe_faces(4, seed=5), describe_faces(4, seed=6)
    assert [p.tobytes() for p in one.pictures] == [p.tobytes() for p in other.pictures]
    assert one.captions[COMPLETE] != other.captions[COMPLETE]
    assert one.captions[BRIEF] != other.captions[BRIEF]
    assert torch.equal(one.truth.readings, other.truth.readings)


def test_complete_captions_name_all_that_is_there() -> None:
    faces = describe_faces(4, seed=5)
    for content, said in zip(faces.truth.contents, faces.captions[COMPLETE], strict=True):
        item = shown(STYLE, draw(STYLE, options_of(content))[1])  # type: ignore[arg-type]
        phrases = present_phrases(item, Speaker(np.random.default_rng(0)), complete=True)
        assert phrases and all(phrase in said for phrase in phrases)


# Reports


def test_every_kind_and_way_has_its_row(finished: Finished) -> None:
    rows = finished.rows
    assert list(rows) == KINDS
    for (kind, _), row in rows.items():
        assert row["count"] == (len(PHRASES) if kind == PHRASE else 2) == len(row["targets"])
        expected = {"essence", "identity"} | (set() if kind == PHRASE else {"transfer", "cosine"})
        assert set(row["scores"]) == set(row["each"]) == expected
        assert row["length"] > 0
        for name, values in row["each"].items():
            assert row["scores"][name]["mean"] == pytest.approx(float(np.mean(values)), abs=1e-5)
    report = json.loads((finished.out / "report.json").read_text())
    assert report["rows"] == list(rows.values()) and report["count"] == 2 and report["seed"] == 5
    captions = describe_faces(2, seed=5).captions
    assert {kind: rows[kind, RAW]["targets"] for kind in captions} == captions


def test_a_text_is_taken_as_the_product_takes_it_and_raw(setup: Setup, finished: Finished) -> None:
    rows, faces = finished.rows, describe_faces(2, seed=5)
    seen = F.normalize(setup.essence.scene.embedder.embed_pictures(faces.pictures), dim=1)
    said = faces.captions[COMPLETE]
    product = torch.stack([setup.essence.embed_target(Text(text)) for text in said])
    raw = F.normalize(setup.texts.embedder.embed_texts(said), dim=1)
    for way, embeddings in {PICTURE: seen, TEXT: product, RAW: raw}.items():
        row = rows[FACE if way == PICTURE else COMPLETE, way]
        expected = (embeddings * seen).sum(dim=1).tolist()
        assert row["each"]["cosine"] == pytest.approx(expected, abs=1e-5)
        directions = setup.essence.asked_mapper()(embeddings).directions
        length = float(directions.flatten(1).norm(dim=1).mean())
        assert row["length"] == pytest.approx(length, rel=1e-4)
    assert rows[FACE, PICTURE]["each"]["cosine"] == pytest.approx([1, 1], abs=1e-5)
    lengths = {row["length"] for (kind, _), row in rows.items() if kind in (FACE, COMPLETE)}
    assert len(lengths) == 3


def test_a_direction_of_nothing_brings_nothing_and_changes_nobody(setup: Setup) -> None:
    essence = setup.essence
    silent = Mapper(essence.asked_mapper().config).eval().requires_grad_(False)
    torch.nn.init.zeros_(silent.direction.weight)
    still = replace(setup, essence=EssenceTransfer(essence.scene, silent, texts=setup.texts))
    result = judge_targets(still, PHRASE, TEXT, list(PHRASES), truth_of_phrases())
    assert result.scores["essence"].abs().max() < 1e-5
    torch.testing.assert_close(result.scores["identity"], torch.ones(len(PHRASES)))


def test_the_tables_have_the_numbers_of_the_report(finished: Finished) -> None:
    rows, text = finished.rows, (finished.out / "report.md").read_text()
    lines = text.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    found = {(row[0], row[1]): row for row in cells if (row[0], row[1]) in rows}
    assert list(found) == KINDS
    for kind, row in found.items():
        essence = rows[kind]["scores"]["essence"]
        expected = f"{essence['mean']:.3f} [{essence['low']:.3f}, {essence['high']:.3f}]"
        assert row[3] == expected and (row[5] == "") == (kind[0] == PHRASE)
    single = {row[0]: row[1:] for row in cells if row[0] in PHRASES}
    for place, phrase in enumerate(PHRASES):
        expected_cells = [
            f"{rows[PHRASE, way]['each'][name][place]:.3f}"
            for way in (TEXT, RAW)
            for name in ("essence", "identity")
        ]
        assert single[phrase] == expected_cells
    assert finished.printed.strip() in text


def test_the_grid_has_a_row_a_text(finished: Finished) -> None:
    with Image.open(finished.out / "grid.png") as grid:
        rows = 1 + 3 * 2 + len(PHRASES)  # sources, two faces three times, phrases
        assert grid.height // rows > 256 and grid.height // (rows + 1) < 300
        assert len(grid.convert("RGB").getcolors(1 << 22) or ()) > 100


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "--count: expected 1 or more, found 0"),
        ({"sources": 1}, "--sources: expected 2 or more, found 1"),
        ({"mapper": None}, "--mapper: expected a mapper's file, for world 'tiny' names none"),
        ({"mapper": Path("nowhere.safetensors")}, "nowhere.safetensors: no such mapper file"),
        ({"world": "nowhere"}, "unknown world 'nowhere'"),
    ],
)
def test_what_cannot_be_is_one_line(
    changes: dict[str, Any], message: str, face_world: Path, mapper: Path, tmp_path: Path
) -> None:
    config = configured(face_world, mapper, tmp_path / "out")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(replace(config, **changes))
    assert "\n" not in str(caught.value) and not config.out.exists()


def test_a_world_without_neutral_texts_is_refused(
    face_world: Path, mapper: Path, tmp_path: Path
) -> None:
    bare = face_world.with_name("bare.toml")
    bare.write_text(face_world.read_text().replace(NEUTRAL, ""))
    with pytest.raises(ValueError, match="--world: expected a world with neutral texts"):
        run(configured(bare, mapper, tmp_path / "out"))


def test_a_world_whose_pictures_the_reader_does_not_know_is_refused(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    other = tiny_world.with_name("neutral.toml")
    other.write_text(tiny_world.read_text() + NEUTRAL)
    with pytest.raises(ValueError, match=r"--world: expected .* of 128 px"):
        run(configured(other, tiny_mapper, tmp_path / "out"))


def test_an_error_is_one_line_and_exit_code_one(
    face_world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert module_exit_code(texts, "--out", tmp_path / "out", "--world", face_world) == 1
    error = capsys.readouterr().err
    assert "error: --mapper" in error and error.count("\n") == 1
