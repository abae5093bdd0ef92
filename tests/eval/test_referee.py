"""The referee: scores of results that are known, faults in files, resuming, paired differences."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import module_exit_code
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from torch import Tensor

from data.illustrated.codes import draw_face
from data.illustrated.shown import Shown
from data.targets import draw_avatar, face_at
from eval import judging, referee
from eval.metrics import (
    essence_acquired,
    essence_by_attribute,
    identity_by_attribute,
    identity_kept,
)
from eval.reader import READINGS, load_reader
from eval.referee import Config, run
from eval.report import REFEREE, referee_text
from eval.sets import content_of
from eval.truth import truth_of, with_essence
from targetclip.encoders.identity import AvatarIdentity
from targetclip.media.images import picture_to_tensor, read_picture

SIZE = 32
SOURCES = {"ann": "navy", "bob": "olive", "cy": "maroon"}  # colours of the ground
TARGETS = {"red": "red", "lime": "lime"}  # colours of the square
WHITE = "white"
READ = {"essence", "identity_by_attribute"}  # scores of the attribute reader
NOTHING = {"glasses": "", "beard": "", "hat": "", "hair_colour": ""}
Maker = Callable[[str, str], Image.Image]


def drawn(ground: str, square: str = WHITE) -> Image.Image:
    """Draw a square before a ground."""
    picture = Image.new("RGB", (SIZE, SIZE), ground)
    ImageDraw.Draw(picture).rectangle((10, 10, 21, 21), fill=square)
    return picture


def perfect(target: str, source: str) -> Image.Image:
    return drawn(SOURCES[source], TARGETS[target])


def unchanged(target: str, source: str) -> Image.Image:
    return drawn(SOURCES[source])


def copied(target: str, source: str) -> Image.Image:
    return drawn("gray", TARGETS[target])


def blurred(target: str, source: str) -> Image.Image:
    return drawn(SOURCES[source]).filter(ImageFilter.GaussianBlur(2))


def save(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def write_results(folder: Path, make: Maker, name: str = "{target}/{source}.png") -> Path:
    """Write the result of every target and source."""
    for target in TARGETS:
        for n, source in enumerate(SOURCES):
            save(make(target, source), folder / name.format(target=target, source=source, n=n))
    return folder


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """A folder with sources, targets and perfect results."""
    for name, ground in SOURCES.items():
        save(drawn(ground), tmp_path / "sources" / f"{name}.png")
    for name, square in TARGETS.items():
        save(drawn("gray", square), tmp_path / "targets" / f"{name}.png")
    write_results(tmp_path / "perfect", perfect)
    return tmp_path


def config(faces: Path, world: Path, *results: str, **changes: Any) -> Config:
    return Config(
        sources=faces / "sources",
        targets=faces / "targets",
        results=tuple(faces / name for name in results or ("perfect",)),
        world=str(world),
        out=faces / "out",
        **changes,
    )


def means(row: dict[str, Any]) -> dict[str, float]:
    return {score: row[score]["mean"] for score in REFEREE if score in row}


# Scores


def test_known_results_have_known_scores(
    faces: Path, who_world: Path, clip_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for make in (unchanged, copied, blurred):
        write_results(faces / make.__name__, make)
    (faces / "copied" / "seconds.txt").write_text("0.25\n")
    tools = ("perfect", "unchanged", "copied", "blurred")
    report = run(config(faces, who_world, *tools, judge=str(clip_dir)))
    assert json.loads((faces / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    found = {name: means(row) for name, row in report["results"].items()}
    assert [*found] == [*tools] and all({*row} == {*REFEREE} - READ for row in found.values())
    assert report["truth"] == {} and all(not r["by_attribute"] for r in report["results"].values())
    same = found["unchanged"]
    assert same["identity"] == pytest.approx(1) and same["sharpness"] == pytest.approx(1)
    assert same["outside"] == same["consistency"] == 0
    for score in ("clip", "second", "target_identity"):
        assert same[score] == pytest.approx(report["unedited"][score], abs=1e-6)
        assert found["copied"][score] == pytest.approx(1)
    assert found["perfect"]["clip"] > same["clip"] + 0.05
    assert found["perfect"]["target_identity"] < 0.99 and found["perfect"]["identity"] < 0.99
    assert found["perfect"]["outside"] == 0 < 0.2 < found["copied"]["outside"]
    assert found["perfect"]["consistency"] > 0.05
    assert found["blurred"]["sharpness"] < 0.6 < 0.8 < found["copied"]["sharpness"]
    perfect_row = report["results"]["perfect"]
    assert perfect_row["clip"]["low"] <= perfect_row["clip"]["mean"] <= perfect_row["clip"]["high"]
    assert perfect_row["clip"]["count"] == 2
    by_target = [row["clip"] for row in perfect_row["by_target"].values()]
    assert sum(by_target) / 2 == pytest.approx(perfect_row["clip"]["mean"], abs=1e-6)
    assert (perfect_row["images"], perfect_row["references"]) == (6, 3)
    assert report["results"]["unchanged"]["fid"] < perfect_row["fid"]
    assert report["results"]["copied"]["seconds"] == 0.25 and perfect_row["seconds"] is None
    assert report["notes"] == []
    text = (faces / "out" / "report.md").read_text()
    assert text == referee_text(report) and "the second judge's embedding" in text
    assert f"| copied | {found['copied']['identity']:.3f} [" in text and "| 0.250 |" in text
    for name in ("sheet.png", "chart.png"):
        with Image.open(faces / "out" / name) as picture:
            assert min(picture.size) >= 300
    assert "sheet.png, chart.png; next: read report.md" in capsys.readouterr().out


def test_paired_differences_are_over_what_both_have(faces: Path, who_world: Path) -> None:
    write_results(faces / "mixed", lambda t, s: (copied if t == "red" else perfect)(t, s))
    (faces / "mixed" / "red" / "ann.png").unlink()
    (faces / "perfect" / "red" / "bob.png").unlink()
    found = run(config(faces, who_world, "mixed", "perfect"))
    assert list(found["differences"]) == ["mixed"]
    rows = found["differences"]["mixed"]["perfect"]
    # Of red they share one source, whose ground became grey; of lime all are the same.
    grounds = zip(ImageColor.getrgb("gray"), ImageColor.getrgb(SOURCES["cy"]), strict=True)
    change = sum(abs(new - old) for new, old in grounds) / 3 / 255
    assert rows["outside"]["mean"] == pytest.approx(change / 2, abs=1e-5)
    assert (rows["outside"]["low"], rows["outside"]["high"]) == pytest.approx((0, change), abs=1e-5)
    red = [found["results"][name]["by_target"]["red"]["outside"] for name in ("mixed", "perfect")]
    assert red[0] != pytest.approx(change, abs=1e-3) and red[1] == 0  # over all that each has
    assert rows["consistency"] == {"mean": 0, "low": None, "high": None, "count": 1}
    assert "| mixed less perfect |" in (faces / "out" / "report.md").read_text()


def test_a_world_without_an_identity_model_scores_the_rest(faces: Path, tiny_world: Path) -> None:
    report = run(config(faces, tiny_world))
    assert {"clip", "consistency", "outside", "sharpness"} == set(
        means(report["results"]["perfect"])
    )
    assert report["notes"] == ["identity is not scored: world tiny names no identity model"]
    assert (faces / "out" / "sheet.png").exists() and not (faces / "out" / "chart.png").exists()


# Scores by the attribute reader

FACES = {"ann": 0, "bob": 1, "cy": 2}  # indices of avataaars:N@31
WORN = 0  # index of held-out:N@31 that wears something


def drawn_face(values: Sequence[int]) -> Image.Image:
    return Image.fromarray(draw_face(values)[0])


@pytest.fixture
def avatars(tmp_path: Path) -> Path:
    """A folder with faces as sources, a face and an avatar of another style as targets, and what
    the latter shows; and results: right ones, of the face alone, and unchanged and swapped ones."""
    faces = {name: face_at(31, i) for name, i in FACES.items()}
    target = face_at(31, 7)
    for name, values in faces.items():
        save(drawn_face(values), tmp_path / "sources" / f"{name}.png")
    save(drawn_face(target), tmp_path / "targets" / "face.png")
    save(draw_avatar("held-out", 31, WORN), tmp_path / "targets" / "other.png")
    shown = content_of("held-out", 31, WORN)
    assert isinstance(shown, Shown)
    truth = {"other.png": {**vars(shown), "style": "personas", "held_out": True}}
    (tmp_path / "targets" / "truth.json").write_text(json.dumps(truth))
    for name, values in faces.items():
        right = drawn_face(with_essence(values, tuple(target)))
        save(right, tmp_path / "right" / "face" / f"{name}.png")
        save(drawn_face(with_essence(values, shown)), tmp_path / "right" / "other" / f"{name}.png")
        other = next(face for face in faces if face != name)
        for goal in ("face", "other"):
            save(drawn_face(values), tmp_path / "unchanged" / goal / f"{name}.png")
            save(drawn_face(faces[other]), tmp_path / "swapped" / goal / f"{name}.png")
    return tmp_path


@pytest.fixture
def avatar_world(who_world: Path) -> Path:
    """The tiny world under the name of the one that the reader knows."""
    world = who_world.with_name("avatars.toml")
    world.write_text(who_world.read_text().replace('name = "tiny"', 'name = "avatars"'))
    return world


def test_attributes_have_known_scores(avatars: Path, avatar_world: Path) -> None:
    tools = ("right", "unchanged", "swapped")
    report = run(config(avatars, avatar_world, *tools))
    assert report["truth"] == {"face": "read", "other": "given"} and report["notes"] == []
    right, unchanged, swapped = (report["results"][name] for name in tools)
    assert right["essence"]["low"] > 0.95 and right["identity_by_attribute"]["low"] > 0.95
    assert unchanged["essence"]["mean"] == pytest.approx(0, abs=1e-5)
    assert unchanged["identity_by_attribute"]["mean"] == pytest.approx(1, abs=1e-5)
    assert swapped["identity_by_attribute"]["mean"] < 0.4
    assert {*right["by_attribute"]["identity"]} <= {r.name for r in READINGS if not r.essence}
    for name in ("top", "hat"):  # of the face alone, and of the other alone
        found = right["by_attribute"]["essence"][name]
        assert found["count"] == 1 and found["low"] is None and found["mean"] > 0.95
    skin = swapped["by_attribute"]["identity"]["skinColor"]
    assert skin["count"] == 2 and skin["low"] <= skin["mean"] <= skin["high"] < 0.5
    less = report["differences"]["right"]["unchanged"]
    assert less["essence"]["mean"] > 0.9 and abs(less["identity_by_attribute"]["mean"]) < 0.05
    # Of the one target that is held out there are means, and no interval.
    assert report["held_out"] == ["other"]
    for score, row in right["held_out"].items():
        expected = right["by_target"]["other"][score]
        assert row["mean"] == pytest.approx(expected, abs=1e-6) and row["low"] is None
    assert {*right["held_out"]} == {*right["by_target"]["other"]}
    text = (avatars / "out" / "report.md").read_text()
    assert "Over the held-out targets alone, 1 of 2:" in text
    assert "Essence acquired by attribute:" in text and "Identity kept by attribute:" in text
    assert "What targets show, a file says for 1, the reader says for 1." in text


def test_attributes_are_scored_by_the_functions_of_the_comparison(
    avatars: Path, avatar_world: Path
) -> None:
    report = run(config(avatars, avatar_world, "swapped"))
    shown = content_of("held-out", 31, WORN)
    truth, reader = truth_of([tuple(face_at(31, 7)), shown]), load_reader()

    def read(folder: str) -> Tensor:
        pictures = [read_picture(avatars / folder / f"{name}.png") for name in FACES]
        return reader.read(torch.cat([picture_to_tensor(one, 128) for one in pictures]))[1]

    before = read("sources")
    after = torch.stack([read("swapped/face"), read("swapped/other")])
    essence = essence_acquired(after, before, truth.readings, truth.seen)
    row = report["results"]["swapped"]
    assert row["essence"]["mean"] == pytest.approx(float(essence.mean()), abs=1e-5)
    kept = identity_kept(after, before)
    assert row["identity_by_attribute"]["mean"] == pytest.approx(float(kept.mean()), abs=1e-5)
    for kind, expected in (
        ("essence", essence_by_attribute(after, before, truth.readings, truth.seen)),
        ("identity", identity_by_attribute(after, before)),
    ):
        found = {name: score["mean"] for name, score in row["by_attribute"][kind].items()}
        assert found == pytest.approx(expected, abs=1e-4)


def test_the_reader_is_not_trusted_with_other_styles(
    avatars: Path, avatar_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (avatars / "targets" / "truth.json").write_text(json.dumps({"nobody.png": NOTHING}))
    save(draw_avatar("held-out", 31, 1), avatars / "sources" / "dan.png")
    save(draw_avatar("held-out", 31, 1), avatars / "unchanged" / "face" / "dan.png")
    report = run(config(avatars, avatar_world, "unchanged"))
    assert report["truth"] == {"face": "read", "other": None}
    rows = report["results"]["unchanged"]["by_target"]
    assert "essence" in rows["face"] and "essence" not in rows["other"]
    assert rows["other"]["identity_by_attribute"] == pytest.approx(1, abs=1e-5)
    notes, said = " ".join(report["notes"]), capsys.readouterr().err
    for words in (
        "truth of 1 files that are no targets: nobody.png",
        "leaves out 1 of 2 targets, which are not in the generator's style; a truth.json",
        "leave out 1 of 4 sources, which are not in the generator's style: dan",
    ):
        assert words in notes and words in said


def test_attributes_are_left_out_where_faces_cannot_be_drawn(
    avatars: Path, avatar_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dicebear", None)
    report = run(config(avatars, avatar_world, "unchanged"))
    row = report["results"]["unchanged"]
    assert not {*row} & READ and row["by_attribute"] == {} and report["truth"] == {}
    [note] = report["notes"]
    assert note.startswith("attributes are not scored: a face in the generator's style is drawn")


# Faults


def test_what_is_wrong_with_files_is_named_and_the_rest_is_judged(
    faces: Path, who_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = faces / "perfect"
    (folder / "red" / "ann.png").unlink()
    save(drawn("navy"), folder / "red" / "dan.png")
    save(perfect("red", "bob").resize((16, 16)), folder / "red" / "bob.png")
    (folder / "lime" / "cy.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (faces / "targets" / "blue.png").write_bytes(b"")
    report = run(config(faces, who_world))
    row = report["results"]["perfect"]
    assert row["faults"]["missing"] == ["blue/ann", "blue/bob", "blue/cy", "red/ann"]
    assert row["faults"]["surplus"] == [str(Path("red", "dan.png"))]
    assert row["faults"]["mis_sized"] == ["red/bob, 16 x 16 for 32 x 32 px"]
    [damaged] = row["faults"]["damaged"]
    assert "cy.png" in damaged and row["images"] == 4
    assert report["targets"] == ["lime", "red"] and len(report["notes"]) == 5
    text, error = (faces / "out" / "report.md").read_text(), capsys.readouterr().err
    for words in ("blue.png", "perfect: 4 missing: blue/ann", "1 of no target", "not readable"):
        assert words in text and words in error


def test_results_of_nothing_are_refused_in_one_line(faces: Path, who_world: Path) -> None:
    (faces / "empty").mkdir()
    (faces / "broken" / "red").mkdir(parents=True)
    (faces / "broken" / "red" / "ann.png").write_bytes(b"x")
    write_results(faces / "other", perfect, "{target}/by {source}.png")
    (faces / "double" / "perfect").mkdir(parents=True)
    (faces / "table.csv").write_text("source,result\nann,a.png\n")
    shutil.copytree(faces / "perfect", faces / "double" / "perfect", dirs_exist_ok=True)
    for names, message in [
        (["empty"], "expected pictures such as 'lime/ann.png'.*found 0 of other names"),
        (["other"], "found 6 of other names, such as '.*by ann.png'"),
        (["broken"], "--results: broken: found no result that can be read"),
        (["perfect", "double/perfect"], "names that differ, found 'perfect' twice"),
        (["nowhere"], "expected a folder or a .csv, found none at .*nowhere"),
        (["table.csv"], "expected the columns source, target and result, found source, result"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            run(config(faces, who_world, *names))
        assert "\n" not in str(caught.value)
    save(drawn("navy"), faces / "sources" / "ann.bmp")
    with pytest.raises(ValueError, match=r"--sources: .*'ann.bmp' and 'ann.png'.*rename one"):
        run(config(faces, who_world))
    with pytest.raises(ValueError, match="--judge-pretrained: expected --judge as well"):
        run(config(faces, who_world, judge_pretrained="openai"))


# Resuming


def test_an_interrupted_run_goes_on_where_it_was(
    faces: Path, who_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    embed = AvatarIdentity.embed_images

    def watched(self: AvatarIdentity, images: Tensor) -> Tensor:
        if sum(seen) >= 6 and len(seen) < 100:
            seen.extend([0] * 100)
            raise KeyboardInterrupt
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(AvatarIdentity, "embed_images", watched)
    monkeypatch.setattr(judging, "AT_ONCE", 2)
    made = config(faces, who_world)
    with pytest.raises(KeyboardInterrupt):
        run(made)
    assert sum(seen) == 6 and not (made.out / "report.json").exists()
    first = run(made)
    assert sum(seen) == 11  # sources, targets and results, each once
    assert run(made)["results"] == first["results"] and sum(seen) == 11
    kept = sorted((made.out / "embeddings").iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    assert run(made)["results"] == first["results"] and sum(seen) == 13
    # What is known by its content is not looked at again under another name.
    shutil.copytree(faces / "perfect", faces / "again")
    assert "again" in run(config(faces, who_world, "again"))["results"] and sum(seen) == 13


# The command


def test_the_command_writes_the_report_and_refuses_in_one_line(
    faces: Path,
    who_world: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"sources": "sources", "targets": "targets", "results": "perfect", "out": "out"}
    given = [word for k, v in words.items() for word in (f"--{k}", faces / v)]
    arguments = [*given, "--world", who_world]
    assert module_exit_code(referee, *arguments) == 0 and (faces / "out" / "report.md").is_file()
    capsys.readouterr()
    shutil.rmtree(faces / "targets")
    assert module_exit_code(referee, *arguments) == 1
    assert "error: --targets: expected a folder of pictures" in capsys.readouterr().err
