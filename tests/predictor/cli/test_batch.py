"""Several targets and many sources in one run: results, names, the sheet and the reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import one_line, report_of
from PIL import Image

from data.illustrated.avatars import draw, render
from predictor.direction import Direction
from predictor.transfer import EssenceTransfer
from targetclip.directions import load_direction
from targetclip.media.images import read_picture, tensor_to_pictures

Run = Callable[..., int]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of four people, and what else such folders hold."""
    folder = tmp_path / "people"
    folder.mkdir()
    for i, name in enumerate(("ada.png", "bruno 10.jpg", "bruno 9.jpg", "dora.webp")):
        Image.fromarray(render(draw("avataaars", {"seed": f"5-{i}"})[0], 64)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_of_sources_is_a_batch_and_results_keep_the_names(
    run: Run,
    tmp_path: Path,
    photographs: Path,
    direction_file: Path,
    tiny: EssenceTransfer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", "--sources", photographs, "--direction", direction_file) == 0
    vector = load_direction(direction_file, tiny.scene.generator).direction
    names = {"ada": "ada.png", "bruno 9": "bruno 9.jpg", "bruno 10": "bruno 10.jpg",
             "dora": "dora.webp"}  # fmt: skip
    for name, file in names.items():  # each as if it were alone: nothing is smoothed
        ws = tiny.scene.invert([read_picture(photographs / file)])
        [expected] = tensor_to_pictures(tiny.scene.edit(ws, vector))
        found = pixels(tmp_path / "out" / f"edited_{name}.png").astype(int)
        assert abs(found - np.asarray(expected)).max() <= 1
    report = report_of(tmp_path / "out")
    assert report["edited"] == [f"edited_{name}.png" for name in names]
    assert report["sources"] == [str(photographs / file) for file in names.values()]
    [warning] = report["warnings"]
    assert warning.endswith("4 pictures taken, 1 left out: notes.txt")
    assert f"targetclip: warning: {warning}" in capsys.readouterr().err


def test_sources_of_one_name_have_results_of_several(
    run: Run, tmp_path: Path, faces: list[Path], direction_file: Path
) -> None:
    (tmp_path / "other").mkdir()
    for name in ("A.png", "a_2.png"):
        (tmp_path / "other" / name).write_bytes(faces[2].read_bytes())
    given = (faces[1], tmp_path / "other" / "A.png", tmp_path / "other" / "a_2.png")
    assert run("transfer", "--sources", *given, "--direction", direction_file) == 0
    edited = report_of(tmp_path / "out")["edited"]
    assert edited == ["edited_a.png", "edited_A_2.png", "edited_a_2_2.png"]
    assert all((tmp_path / "out" / name).is_file() for name in edited)


def test_several_targets_are_several_results(
    run: Run,
    tmp_path: Path,
    faces: list[Path],
    tiny: EssenceTransfer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", "--target", *faces[:2], "--num-sources", 2) == 0
    printed = capsys.readouterr().out
    alone = tmp_path / "alone"
    for target, name in zip(faces[:2], ("target", "a"), strict=True):
        assert run("transfer", "--target", target, "--num-sources", 2, "--out", alone) == 0
        folder = tmp_path / "out" / name
        one, other = (
            load_direction(path / "direction.safetensors", tiny.scene.generator).direction
            for path in (folder, alone)
        )
        torch.testing.assert_close(one, other)
        for file in ("edited_000.png", "edited_001.png"):
            np.testing.assert_array_equal(pixels(folder / file), pixels(alone / file))
        mine, single = report_of(folder), report_of(alone)
        assert mine["target"] == single["target"] == str(target)
        assert mine["scores"]["transfer"] == pytest.approx(single["scores"]["transfer"], abs=1e-5)
        assert f"{name}: direction by optimizer, transfer score" in printed
    report = report_of(tmp_path / "out")
    assert [row["folder"] for row in report["targets"]] == ["target", "a"]
    assert report["targets"][1]["scores"] == report_of(tmp_path / "out" / "a")["scores"]
    assert {"grid.png", "report.json", "a/edited_000.png"} <= {*report["files"]}
    with Image.open(tmp_path / "out" / "grid.png") as grid:  # targets by sources
        assert 3 * 256 < grid.width < 4 * 280 and 3 * 256 < grid.height < 3 * 310


def test_a_folder_of_targets_is_that_many_and_a_second_run_replaces_them(
    run: Run, tmp_path: Path, photographs: Path, faces: list[Path]
) -> None:
    assert run("optimize", "--target", photographs, steps=1) == 0
    out = tmp_path / "out"
    folders = {"ada", "bruno 9", "bruno 10", "dora"}
    assert {path.name for path in out.iterdir()} == {*folders, "report.json"}
    for name in folders:
        assert {p.name for p in (out / name).iterdir()} == {"direction.safetensors", "report.json"}
    (out / "dora" / "mine.txt").write_text("precious")
    assert run("optimize", "--target", faces[0], steps=1) == 0
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert left == {"direction.safetensors", "report.json", "dora/mine.txt"}


def test_ctrl_c_in_the_second_of_several_targets_keeps_both(
    run: Run, tmp_path: Path, faces: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    from targetclip.scene import Scene

    search = Scene.search

    def search_twice(self: Scene, *given: object, on_step: Callable[..., None], **more: object):  # type: ignore[no-untyped-def]
        def stepped(progress: object) -> None:
            on_step(progress)
            steps.append(1)
            if len(steps) == 5:
                raise KeyboardInterrupt

        return search(self, *given, on_step=stepped, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Scene, "search", search_twice)
    assert run("transfer", "--target", *faces, "--num-sources", 1) == 130
    report = report_of(tmp_path / "out")
    assert report["interrupted"] is True
    assert [row["direction"]["steps"] for row in report["targets"]] == [3, 2]
    assert report_of(tmp_path / "out" / "a")["interrupted"] is True
    assert not (tmp_path / "out" / "b").exists()


def test_the_sheet_of_many_sources_shows_the_first_64(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ("--num-sources", 70, "--direction", direction_file, "--max-images", 16)
    assert run("transfer", *many) == 0
    out = tmp_path / "out"
    assert "grid.png and index.html show the first 64 of 70 sources" in capsys.readouterr().out
    assert len(list(out.glob("edited_*.png"))) == 70
    assert len(report_of(out)["scores"]["each"]["target_similarity_after"]) == 70
    with Image.open(out / "grid.png") as grid:  # four times two rows of sixteen, and the target
        assert 17 * 128 < grid.width < 18 * 150 and 8 * 128 < grid.height < 8 * 170


def test_texts_are_several_results_too(
    run: Run, tmp_path: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tiny_world.with_name("texts.toml")
    world.write_text(tiny_world.read_text() + 'neutral = ["a face"]\n')
    texts = ("green hair", "a hat, red")
    assert run("transfer", "--world", world, "--num-sources", 1, "--text", *texts) == 0
    rows = report_of(tmp_path / "out")["targets"]
    assert [(row["target"], row["folder"]) for row in rows] == [
        ("green hair", "green_hair"), ("a hat, red", "a_hat_red"),
    ]  # fmt: skip
    capsys.readouterr()
    assert run("transfer", "--world", world, "--text", "a hat", "--mix") == 1
    assert "--mix: expected two targets or more" in one_line(capsys.readouterr().err)


def test_a_target_without_a_direction_does_not_end_the_run(
    run: Run, tmp_path: Path, faces: list[Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find, calls = EssenceTransfer.direction, list[int]()

    def failing(self: EssenceTransfer, *given: Any, **more: Any) -> Direction:
        calls.append(1)
        if len(calls) == 2:
            raise FloatingPointError("no direction found: loss is nan")
        return find(self, *given, **more)

    monkeypatch.setattr(EssenceTransfer, "direction", failing)
    assert run("transfer", "--target", *faces, "--num-sources", 1) == 1
    rows = report_of(tmp_path / "out")["targets"]
    assert [row.get("folder") for row in rows] == ["target", None, "b"]
    assert rows[1]["error"] == "no direction found: loss is nan"
    captured = capsys.readouterr()
    assert "2 of 3 targets" in captured.out and f"warning: {faces[1]}: no direction" in captured.err
