"""Published directions become a dataset: those with a picture are in it, the rest is listed."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data import released
from data.build import Config as BuildConfig
from data.build import run as build_run
from data.build import verify_build
from data.dataset import load_pairs, networks_of, verify
from data.pairs import SPLITS
from data.released import Config, import_released
from data.targets import draw_avatar, picture_id, split_of
from targetclip.command import main
from targetclip.recipes import RECIPES
from targetclip.seeds import PAIR_SOURCES
from targetclip.world import load_scene, load_world
from tests.proof.damage import flip_bit, rows_of

NUM_WS, W_DIM = 6, 8  # of the tiny world's generator
PAIRED = ("joker", "elsa", "keanu")


def vector(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, NUM_WS, W_DIM)).astype(np.float32)


def picture(index: int) -> Image.Image:
    return draw_avatar("avataaars", 11, index)


def released_files(folder: Path) -> Config:
    """A release in small: three that pair, and some of all that may go wrong."""
    directions, targets = folder / "dirs", folder / "dirs" / "targets"
    targets.mkdir(parents=True)
    for i, name in enumerate((*PAIRED, "trump", "flat", "large")):
        np.save(directions / f"{name}.npy", vector(i))
    np.save(directions / "flat.npy", np.zeros(5))
    np.save(directions / "large.npy", np.zeros((1, 18, 512)))
    np.save(directions / "w_plus.npy", np.zeros((68, NUM_WS, W_DIM)))
    torch.save(torch.zeros(1, NUM_WS, W_DIM), directions / "me.pt")
    named = ("joker.png", "Elsa.jpg", "keanu.jpeg", "doc_brown.png", "flat.png", "large.png")
    for i, name in enumerate((*named, "me.png")):
        picture(i).save(targets / name)
    (targets / "trump.png").write_bytes(b"no picture")
    return Config(
        out=folder / "pairs", directions=directions, targets=targets, world="", held_out=3
    )


@pytest.fixture
def config(tiny_world: Path, tmp_path: Path) -> Config:
    return replace(released_files(tmp_path), world=str(tiny_world))


@pytest.fixture(scope="module")
def imported(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An import that nothing happened to."""
    made = released_files(tmp_path_factory.mktemp("released"))
    made = replace(made, world=str(tiny_world))
    import_released(made)
    return made


def named_rows(out: Path) -> dict[str, dict[str, Any]]:
    return {Path(row["origin"]).stem.lower(): row for row in rows_of(out)}


def error_of(config: Config) -> str:
    """What an import says that cannot be done; it leaves nothing behind."""
    before = sorted(config.out.parent.iterdir())
    with pytest.raises((ValueError, OSError)) as caught:
        import_released(config)
    assert sorted(config.out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_directions_and_the_pictures_of_their_names_become_rows(imported: Config) -> None:
    rows = named_rows(imported.out)
    assert sorted(rows) == sorted(PAIRED)
    for i, name in enumerate(PAIRED):
        np.testing.assert_array_equal(rows[name]["direction"], vector(i)[0])
        assert rows[name]["recipe"] == "released"
        assert rows[name]["split"] == split_of(rows[name]["id"])
    assert rows["joker"]["id"] == picture_id(picture(0))
    assert rows["elsa"]["origin"] == "targets/Elsa.jpg"


def test_what_only_their_makers_could_tell_is_zero_or_empty(imported: Config) -> None:
    for row in rows_of(imported.out):
        unknown = ("loss", "transfer", "consistency", "steps", "seconds", "seed")
        assert [row[name] for name in unknown] == [0] * len(unknown)
        assert row["coefficients"] == []


def test_embeddings_and_held_out_scores_are_those_of_a_build(imported: Config) -> None:
    world = load_world(imported.world)
    scene = load_scene(world, torch.device("cpu"))
    recipe = RECIPES[world.recipe]
    row = named_rows(imported.out)["joker"]
    target = scene.embed_targets([picture(0)], recipe)
    assert row["norm"] == pytest.approx(float(target.norm()), rel=1e-5)
    np.testing.assert_allclose(row["embedding"], F.normalize(target, dim=1)[0], atol=1e-5)
    sources = scene.sources(3, PAIR_SOURCES)

    def embed(ws: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            images = scene.generator.synthesis(ws)
            return F.normalize(scene.embedder.embed_images(images, recipe.preprocess), dim=1)

    before, after = embed(sources), embed(sources + torch.from_numpy(vector(0)))
    unit = F.normalize(target, dim=1)[0]
    assert row["held_out_before"] == pytest.approx(float((before @ unit).mean()), abs=1e-5)
    assert row["held_out_transfer"] == pytest.approx(float((after @ unit).mean()), abs=1e-5)
    moved = F.normalize(before - after, dim=1)
    cosines = (moved @ moved.T)[~torch.eye(3, dtype=torch.bool)]
    assert row["held_out_consistency"] == pytest.approx(float(cosines.mean()), abs=1e-4)


def test_what_does_not_pair_is_listed_with_its_reason_and_no_path(imported: Config) -> None:
    lines = (imported.out / "failures.jsonl").read_text().splitlines()
    failures = {(failure := json.loads(line))["origin"]: failure for line in lines}
    reasons = {
        "dirs/w_plus.npy": "expected a picture called 'w_plus', found none",
        "targets/trump.png": "not a picture",
        "targets/doc_brown.png": "expected a direction called 'doc_brown', found none",
        "targets/me.png": "a direction called 'me'",
        "targets/flat.png": "'dirs/flat.npy': expected an array [num_ws, w_dim]",
        "targets/large.png": "'dirs/large.npy': expected [6, 8], the generator's W+",
    }
    assert failures.keys() == reasons.keys()
    assert all(text in failures[origin]["reason"] for origin, text in reasons.items())
    assert str(imported.out.parent) not in "".join(lines)


def test_files_of_other_kinds_are_counted_and_named(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    (config.targets / "licence.txt").write_text("none")
    report = import_released(config)
    assert report["not_taken"] == {"count": 2, "files": ["dirs/me.pt", "targets/licence.txt"]}
    assert "1 of 8 files are not taken: me.pt; expected directions" in caplog.text


def test_an_unambiguous_beginning_is_a_name() -> None:
    directions = ["doc.npy", "ed.npy", "joker.npy", "morgan.npy", "zendaya_2.npy"]
    pictures = ["doc_brown.png", "Ed_Sheeran.png", "joker.png", "morgan_freeman.jpg", "zendaya.jpg"]
    partners = released.partners_of(released.by_name(directions), released.by_name(pictures))
    assert partners == {
        "doc_brown": "doc",
        "ed_sheeran": "ed",
        "joker": "joker",
        "morgan_freeman": "morgan",
        "zendaya": "zendaya_2",
    }


def test_a_beginning_that_is_ambiguous_or_ends_in_a_word_stays_alone_and_is_named(
    config: Config,
) -> None:
    for name in ("ed", "joker_2", "doc"):
        np.save(config.directions / f"{name}.npy", vector(9))
    for i, name in enumerate(("ed_sheeran", "ed_norton", "eddie")):
        picture(30 + i).save(config.targets / f"{name}.png")
    import_released(config)
    assert sorted(named_rows(config.out)) == ["doc_brown", "elsa", "joker", "keanu"]
    lines = (config.out / "failures.jsonl").read_text().splitlines()
    reasons = {(failure := json.loads(line))["origin"]: failure["reason"] for line in lines}
    assert "targets/ed_norton.png, targets/ed_sheeran.png begins" in reasons["dirs/ed.npy"]
    assert "targets/joker.png begins" in reasons["dirs/joker_2.npy"]
    assert "found ed.npy begins alike" in reasons["targets/ed_norton.png"]
    assert "'eddie', found none" in reasons["targets/eddie.png"]


def test_the_dataset_is_whole_and_loads(imported: Config, tmp_path: Path) -> None:
    assert verify(imported.out) == []
    assert verify_build(imported.out, imported.out / ".build") == []
    verifying = BuildConfig(out=imported.out, only="verify")
    assert build_run(verifying) == 0
    rows = named_rows(imported.out)
    loaded = 0
    for split in SPLITS:
        if any(row["split"] == split for row in rows.values()):
            pairs = load_pairs(imported.out, split, tmp_path / "cache")
            loaded += len(pairs)
            assert pairs[0]["direction"].shape == (NUM_WS, W_DIM)
            assert pairs[:]["embedding"].shape == (len(pairs), 32)
            assert len(pairs[0]["coefficients"]) == 0
    assert loaded == len(PAIRED)


def test_a_flipped_bit_is_found(imported: Config, tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = {path: path.read_bytes() for path in sorted(imported.out.glob("data/*.parquet"))}
    for path, content in whole.items():
        try:
            flip_bit(path, rng)
            (line,) = verify(imported.out)
            assert line.startswith(f"data/{path.name}: altered")
        finally:
            path.write_bytes(content)
    assert verify(imported.out) == []


def test_card_and_report_say_what_the_rows_are_and_nothing_of_this_machine(
    imported: Config,
) -> None:
    scene = load_scene(load_world(imported.world), torch.device("cpu"))
    card = (imported.out / "README.md").read_text()
    prints = (scene.generator.fingerprint, scene.embedder.fingerprint)
    assert networks_of(imported.out) == prints
    assert all(fingerprint in card for fingerprint in prints)
    assert "| recipe | released |" in card and "without a licence" in card
    assert (
        "python -m data.released --out pairs --directions dirs --targets targets "
        "--world world.toml --held-out 3" in card
    )
    report = json.loads((imported.out / "report.json").read_text())
    assert sum(split["pairs"] for split in report["splits"].values()) == len(PAIRED)
    assert report["failures"] == 6
    assert report["settings"]["directions"]["count"] == 7
    texts = [path for path in imported.out.rglob("*") if path.suffix in (".md", ".json", ".jsonl")]
    assert len(texts) > 4
    assert not any(str(imported.out.parent) in path.read_text() for path in texts)


def test_the_same_files_give_the_same_bytes(imported: Config, config: Config) -> None:
    import_released(config)
    sums = [(one.out / "SHA256SUMS").read_text() for one in (imported, config)]
    assert sums[0] == sums[1]


def test_several_of_one_name_are_left_out(config: Config) -> None:
    picture(20).save(config.targets / "joker.jpg")
    np.save(config.directions / "Elsa.npy", vector(1))
    import_released(config)
    assert list(named_rows(config.out)) == ["keanu"]
    said = (config.out / "failures.jsonl").read_text()
    assert "2 pictures of one name: targets/joker.jpg, targets/joker.png" in said
    assert "2 directions of one name: Elsa.npy, elsa.npy" in said


def test_a_direction_that_gives_no_finite_score_is_left_out(config: Config) -> None:
    np.save(config.directions / "joker.npy", np.full((1, NUM_WS, W_DIM), 3e38, np.float32))
    import_released(config)
    assert sorted(named_rows(config.out)) == ["elsa", "keanu"]


def test_an_empty_folder_is_filled_and_nothing_else_is_touched(config: Config) -> None:
    config.out.mkdir()
    (config.out / "mine.txt").write_text("mine")
    assert "--out: expected nothing" in error_of(config)
    assert (config.out / "mine.txt").read_text() == "mine"
    (config.out / "mine.txt").unlink()
    import_released(config)
    assert verify(config.out) == []
    assert "--out: expected nothing" in error_of(config)
    assert verify(config.out) == []
    assert "--out: expected nothing" in error_of(replace(config, out=config.out / "README.md"))


def test_what_comes_to_out_meanwhile_is_kept(config: Config) -> None:
    def come(point: str) -> None:
        if point == "before-sums":
            config.out.mkdir()
            (config.out / "theirs.txt").write_text("theirs")

    with pytest.raises(OSError, match="not empty"):
        import_released(config, come)
    assert [path.name for path in config.out.iterdir()] == ["theirs.txt"]
    assert not list(config.out.parent.glob(".*"))


@pytest.mark.parametrize("end_at", ["after-link", "before-sums"])
def test_an_import_that_ends_in_the_middle_leaves_nothing(config: Config, end_at: str) -> None:
    def end(point: str) -> None:
        if point == end_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_released(config, end)
    assert [path.name for path in config.out.parent.iterdir()] == ["dirs"]


def test_nothing_usable_is_an_error(config: Config) -> None:
    for path in config.directions.glob("*.npy"):
        path.write_bytes(b"no array")
    assert "no direction could be paired" in error_of(config)
    for path in config.targets.iterdir():
        path.write_bytes(b"no picture")
    assert "no picture of --targets can be read: 'targets/" in error_of(config)
    for path in config.directions.glob("*.npy"):
        path.rename(path.with_stem(f"no-{path.stem}"))
    assert "expected e.g. 'no-elsa.jpg' for 'no-elsa.npy'" in error_of(config)
    for path in config.directions.glob("*.npy"):
        path.unlink()
    assert "--directions: expected .npy files" in error_of(config)


def test_bad_input_is_one_line_and_no_traceback(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--directions: no folder" in error_of(replace(config, directions=config.out))
    assert "--targets: no folder" in error_of(replace(config, targets=config.out))
    assert "--held-out" in error_of(replace(config, held_out=1))
    assert "--max-images" in error_of(replace(config, max_images=0))
    assert "unknown world" in error_of(replace(config, world="nowhere"))
    flags = ["--out", str(config.out), "--directions", str(config.directions)]
    flags += ["--targets", str(config.targets), "--world"]
    command = partial(main, released.run, Config, released.__doc__, "python -m data.released")
    with pytest.raises(SystemExit) as ended:
        command([*flags, "nowhere"])
    output = capsys.readouterr()
    assert ended.value.code == 1 and output.out == ""
    assert output.err.startswith("python -m data.released: error: unknown world")
    assert output.err.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        command([*flags, config.world])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["failures"] == 6
    assert verify(config.out) == []
