"""The referee: scores of results that are known, faults in files, resuming, paired differences."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runs import module_exit_code
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from torch import Tensor

from eval import referee
from eval.referee import Config, run
from eval.report import REFEREE, referee_text
from targetclip.encoders.identity import AvatarIdentity

SIZE = 32
SOURCES = {"ann": "navy", "bob": "olive", "cy": "maroon"}  # colours of the ground
TARGETS = {"red": "red", "lime": "lime"}  # colours of the square
WHITE = "white"
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
    assert [*found] == [*tools] and all(row.keys() == REFEREE.keys() for row in found.values())
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
    monkeypatch.setattr(referee, "AT_ONCE", 2)
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
