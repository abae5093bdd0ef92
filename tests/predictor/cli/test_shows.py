"""What shows an edit beside the sheet: the strip, the morph, and the page of every result."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_runs import one_line, report_of
from PIL import Image

from predictor.cli import commands
from predictor.transfer import EssenceTransfer
from targetclip.command import STOPPED
from targetclip.directions import load_direction
from targetclip.media.frames import open_frames
from targetclip.media.images import tensor_to_pictures, tile_of

Run = Callable[..., int]
SHOWS = ("--strip", "--morph", "gif")
HOSTILE = "<script>alert(1)<"


@pytest.fixture
def wordy_world(tiny_world: Path) -> Path:
    """The tiny world with neutral texts."""
    world = tiny_world.with_name("shown_texts.toml")
    world.write_text(tiny_world.read_text() + 'neutral = ["a face"]\n')
    return world


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def page_in(folder: Path) -> str:
    return (folder / "index.html").read_text("utf-8")


def test_strip_morph_and_page_are_results_of_a_run_as_others_are(
    run: Run, tmp_path: Path, direction_file: Path
) -> None:
    out, given = tmp_path / "out", ("--num-sources", 2, "--direction", direction_file)
    assert run("transfer", *given, *SHOWS) == 0
    shown = {"strip.png", "morph.gif", "index.html"}
    assert shown < {*report_of(out)["files"]} == names_in(out)
    assert run("transfer", *given) == 0  # which removes what it does not write again
    assert names_in(out) & shown == {"index.html"}


def test_strip_and_morph_show_the_edit_of_the_run(
    run: Run, tmp_path: Path, direction_file: Path, tiny: EssenceTransfer
) -> None:
    given = ("--num-sources", 2, "--direction", direction_file, "--max-images", 1)
    assert run("transfer", *given, *SHOWS, "--strength", 0.8, "--fine", 0, "--coarse", 0.5) == 0
    out = tmp_path / "out"
    vector = load_direction(direction_file, tiny.scene.generator).direction.clone()
    vector[:4] *= 0.5  # the layers of 4 and 8 px; there are none from 64 px on
    with Image.open(out / "edited_001.png") as result, Image.open(out / "strip.png") as strip:
        # The fifth of six columns after the target's is the result.
        left, bottom = 12 + 5 * (256 + 12), strip.height - 12
        found = strip.crop((left, bottom - 256, left + 256, bottom))
        wanted = np.asarray(tile_of(result.convert("RGB"), 256)).astype(int)
        assert np.abs(np.asarray(found) - wanted).max() <= 1
        assert strip.width == 7 * (256 + 12) + 12
    halfway = tensor_to_pictures(tiny.edit(tiny.scene.sources(2), vector, 0.4))[1]
    with Image.open(out / "morph.gif") as morph:
        assert morph.size == (512, 256)
        morph.seek(12)
        found = morph.convert("RGB").crop((256, 0, 512, 256))
        wanted = np.asarray(tile_of(halfway, 256)).astype(int)
        assert np.abs(np.asarray(found) - wanted).mean() < 8


def test_a_morph_may_be_a_video(run: Run, tmp_path: Path, direction_file: Path) -> None:
    pytest.importorskip("av")
    given = ("--num-sources", 1, "--direction", direction_file, "--morph", "mp4")
    assert run("transfer", *given) == 0
    frames = open_frames(tmp_path / "out" / "morph.mp4")
    assert frames.count == 68 and frames.rate == 25
    assert "data:video/mp4;base64," in page_in(tmp_path / "out")


def test_a_video_without_its_extra_and_shows_of_clips_are_refused_before_networks_are_loaded(
    run: Run,
    tmp_path: Path,
    unloadable_world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip").mkdir()
    clip = ("--clip", "--sources", tmp_path / "clip")
    said = {
        ("--morph", "mp4"): '--morph mp4 needs PyAV: pip install "targetclip[video]", or give',
        ("--morph", "gif", *clip): "--morph is for pictures, and",
        ("--strip", *clip): "--strip is for pictures, and",
    }
    for arguments, message in said.items():
        assert run("transfer", "--world", unloadable_world, *arguments) == 1
        assert message in one_line(capsys.readouterr().err)
        assert not (tmp_path / "out").exists()
    assert run("transfer", "--morph", "webm") == 2
    assert "--morph: expected gif or mp4, found 'webm'" in one_line(capsys.readouterr().err)


def test_strip_and_morph_of_many_sources_show_twelve_and_say_so(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--num-sources", 13, "--direction", direction_file)
    assert run("transfer", *given, *SHOWS) == 0
    printed = capsys.readouterr().out
    assert "strip.png and morph.gif show the first 12 of 13 sources" in printed
    assert "grid.png" in printed and "grid.png and index.html show" not in printed
    with Image.open(tmp_path / "out" / "strip.png") as strip:
        assert 12 * (256 + 12) < strip.height < 12 * 300 + 60
    with Image.open(tmp_path / "out" / "morph.gif") as morph:
        assert morph.size == (1024, 768)
    assert page_in(tmp_path / "out").count('class="card"') == 13


def test_a_page_says_how_the_edit_was_made_and_what_came_of_it(
    run: Run, tmp_path: Path, who_world: Path, faces: list[Path]
) -> None:
    given = ("--world", who_world, "--num-sources", 2, "--strength", 4, "--seed", 3)
    assert run("transfer", *given) == 0
    page, report = page_in(tmp_path / "out"), report_of(tmp_path / "out")
    scores = report["scores"]
    before, after = scores["target_similarity_before"], scores["transfer"]
    said = [
        "The essence of target.png",
        "optimized: found by the optimizer",
        "<dd>4</dd>",
        f"{before:.3f} before, {after:.3f} after",
        f"{scores['identity']:.3f}",
        f"identity kept {scores['each']['identity'][1]:.2f}",
        "Warning: strength 4 is far beyond the usual 1",
        f"targetclip transfer --world {who_world} --num-sources 2 --strength 4 --seed 3",
        'href="edited_001.png"',
        'href="grid.png"',
        'href="direction.safetensors"',
    ]
    assert [words for words in said if words not in page] == []


def test_names_and_texts_that_look_like_html_are_shown_as_they_are(
    run: Run, tmp_path: Path, wordy_world: Path, faces: list[Path]
) -> None:
    path = tmp_path / f"{HOSTILE}.png"
    path.write_bytes(faces[1].read_bytes())
    given = ("--world", wordy_world, "--target", path, "--text", HOSTILE, "--sources", path)
    for how in ("--mix", "--quiet"):  # one result, and one for each target
        assert run("transfer", *given, how, "--out", tmp_path / how[2:]) == 0
    pages = [*tmp_path.rglob("index.html")]
    assert len(pages) == 4
    for page in pages:
        html = page.read_text("utf-8")
        assert html.count("<script>") == 1 and "&lt;script&gt;alert(1)&lt;" in html


def test_several_targets_have_a_page_each_and_one_that_leads_to_them(
    run: Run, tmp_path: Path, faces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("transfer", "--target", *faces[:2], "--num-sources", 2, "--strip") == 0
    out = tmp_path / "out"
    page = page_in(out)
    for name, target in (("target", "target.png"), ("a", "a.png")):
        assert f'<a href="{name}/index.html">{target}</a>' in page
        assert {"index.html", "strip.png"} <= names_in(out / name)
        assert f"The essence of {target}" in page_in(out / name)
        assert "grid.png" not in page_in(out / name)  # the sheet is that of all
    assert page.count("<img ") == 2 * (1 + 2)
    files = {*report_of(out)["files"]}
    assert {"index.html", "a/index.html", "a/strip.png", "target/strip.png"} <= files
    assert f"or open {out / 'index.html'}" in capsys.readouterr().out


def test_the_page_of_a_photo_shows_it_whole_and_its_face(
    run: Run,
    tmp_path: Path,
    aligned_world: Path,
    direction_file: Path,
    seeing: Callable[..., object],
) -> None:
    seeing(lambda picture: [(60, 40, 24)])
    photo = tmp_path / "trip.png"
    Image.linear_gradient("L").resize((120, 90)).convert("RGB").save(photo)
    arguments = ("--world", aligned_world, "--sources", photo, "--direction", direction_file)
    assert run("transfer", *arguments, "--strip") == 0
    page = page_in(tmp_path / "out")
    assert page.count('width="120" height="90"') == 2  # source and result
    assert 'href="photo_trip.png"' in page and 'href="edited_trip.png"' in page
    with Image.open(tmp_path / "out" / "strip.png") as strip:  # of the face
        assert strip.height < 400


def test_the_page_of_a_clip_shows_frames_and_the_clip(
    run: Run, tmp_path: Path, direction_file: Path, faces: list[Path]
) -> None:
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(3):
        Image.open(faces[number]).save(clip / f"{number}.png")
    given = ("--clip", "--sources", clip, "--direction", direction_file)
    assert run("transfer", *given) == 0
    page = page_in(tmp_path / "out")
    assert "<h3>frame 2</h3>" in page and 'href="frames/frame_000002.png"' in page


def test_a_run_that_is_stopped_in_a_morph_leaves_nothing_half_written(
    run: Run, tmp_path: Path, direction_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: EssenceTransfer, *given: object) -> object:
        yield Image.new("RGB", (256, 256))
        raise KeyboardInterrupt

    given = ("--num-sources", 1, "--direction", direction_file, *SHOWS)
    with monkeypatch.context() as patched:
        patched.setattr(commands.EssenceTransfer, "morph", stopped)
        assert run("transfer", *given) == STOPPED
    out = tmp_path / "out"
    assert names_in(out) == {
        "direction.safetensors", "edited_000.png", "report.json", "strip.png",
    }  # fmt: skip
    assert report_of(out)["finished"] is False
    assert run("transfer", *given) == 0  # the same command takes the folder and goes through
    assert report_of(out)["finished"] is True and "morph.gif" in names_in(out)


def test_quiet_and_json_hold_for_shows_too(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--num-sources", 1, "--direction", direction_file, *SHOWS)
    assert run("transfer", *given, "--quiet") == 0
    captured = capsys.readouterr()
    assert not captured.out and not captured.err
    assert run("transfer", *given[:4], "--strip", "--json") == 0
    assert capsys.readouterr().out.strip() == (tmp_path / "out" / "report.json").read_text().strip()
