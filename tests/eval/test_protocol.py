"""The release's evaluation end to end: files as people have them, and numbers that are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eval.metrics import frechet_distance
from eval.protocol import KNOWN
from eval.referee import Config, run
from eval.report import protocol_text
from targetclip.media.images import picture_to_tensor, read_picture, tensor_to_pictures
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world

TARGETS = ("joker", "doc_brown")


@pytest.fixture(scope="module")
def scene(who_world: Path) -> Scene:
    return load_scene(load_world(str(who_world)))


@pytest.fixture
def release(tmp_path: Path, scene: Scene) -> Path:
    """A folder with the release's nesting of files: latents, directions and their targets.

    The target of a direction is what it makes of the first latent.
    """
    generator, numbers = scene.generator, torch.Generator().manual_seed(0)
    latents = scene.sources(4, 1)
    np.save(tmp_path / "w_plus.npy", latents.numpy())
    torch.save(latents[:, None], tmp_path / "celebs.pt")
    np.save(tmp_path / "same.npy", latents[[0, 0]].numpy())
    for folder in ("dirs/targets", "zero", "ffhq"):
        (tmp_path / folder).mkdir(parents=True)
    for name, picture in zip(("doc", "Joker"), ("doc_brown.jpg", "joker.png"), strict=True):
        direction = torch.randn(1, generator.num_ws, generator.w_dim, generator=numbers)
        np.save(tmp_path / "dirs" / f"{name}.npy", direction.numpy())
        np.save(tmp_path / "zero" / f"{name}.npy", 0 * direction.numpy())
        [made] = tensor_to_pictures(scene.render(latents[:1] + 1.2 * direction))
        made.save(tmp_path / "dirs" / "targets" / picture, quality=100)
    torch.save(latents, tmp_path / "dirs" / "opt_latents.pt")
    for i, picture in enumerate(tensor_to_pictures(scene.render(latents))):
        picture.save(tmp_path / "ffhq" / f"{i}.png")
    return tmp_path


def config(release: Path, world: Path, **changes: Any) -> Config:
    usual: dict[str, Any] = {
        "sources": release / "w_plus.npy",
        "targets": release / "dirs" / "targets",
        "world": str(world),
        "out": release / "out",
        "protocol": "targetclip",
        "direction": release / "dirs",
    }
    return Config(**{**usual, **changes})


def means(report: dict[str, Any], method: str = "published") -> dict[str, float]:
    return {name: score["mean"] for name, score in report["methods"][method].items()}


# Numbers


def test_a_direction_of_nothing_keeps_all_identity_and_every_picture(
    release: Path, who_world: Path, scene: Scene
) -> None:
    asked = config(release, who_world, direction=release / "zero", references=release / "ffhq")
    report = run(asked)
    row = report["methods"]["published"]
    assert row["identity"]["mean"] == pytest.approx(100, abs=1e-3)
    assert row["identity"]["deviation"] == pytest.approx(0, abs=1e-3)
    assert row["identity_released"]["mean"] < 99.9  # the fault: another range of values
    # The other scores are those of unedited sources.
    latents = torch.from_numpy(np.load(release / "w_plus.npy"))
    before = scene.embedder.embed_images(scene.render(latents))
    pictures = [read_picture(p) for p in sorted((release / "dirs" / "targets").iterdir())]
    goals = scene.embedder.embed_pictures(pictures)
    cosines = torch.nn.functional.cosine_similarity(before[None], goals[:, None], dim=2)
    # The references are the same images, as pictures: clamped, and of 8 bits.
    shown = [picture_to_tensor(read_picture(p), 16) for p in sorted((release / "ffhq").iterdir())]
    distance = frechet_distance(before, scene.embedder.embed_images(torch.cat(shown)))
    assert row["fid"]["mean"] == pytest.approx(distance, rel=1e-3)
    assert row["fid"]["deviation"] == pytest.approx(0, abs=1e-3)
    expected = 100 * cosines.mean(dim=1)
    assert row["semantic"]["mean"] == pytest.approx(float(expected.mean()), abs=1e-2)
    assert row["semantic"]["deviation"] == pytest.approx(
        float(expected.std(correction=0)), abs=1e-2
    )


def test_results_that_are_their_target_have_all_of_it(
    release: Path, who_world: Path, clip_dir: Path
) -> None:
    joker = release / "joker"
    joker.mkdir()
    (release / "dirs" / "targets" / "joker.png").rename(joker / "joker.png")
    asked = config(
        release, who_world, sources=release / "same.npy", targets=joker, judge=str(clip_dir)
    )
    report = run(asked)
    found = means(report)
    for score in ("semantic", "second", "target_identity"):
        assert found[score] == pytest.approx(100, abs=0.5), score  # the target is clamped
    assert found["identity"] < 99.9 and "fid" not in found
    assert report["targets"] == ["joker/joker.png"]
    assert [note for note in report["notes"] if "doc.npy: left out" in note]


def test_latents_are_the_same_however_they_are_nested(release: Path, who_world: Path) -> None:
    first = run(config(release, who_world))
    again = run(config(release, who_world, sources=release / "celebs.pt", out=release / "again"))
    assert again["methods"] == first["methods"]
    assert first["sources"] == [0, 1, 2, 3] and first["strength"] == 1.2
    fewer = run(config(release, who_world, leave_out=(1, 3)))
    assert fewer["sources"] == [0, 2]
    assert means(fewer)["semantic"] != pytest.approx(means(first)["semantic"], abs=1e-4)


def test_pictures_that_are_kept_are_those_that_were_judged(
    release: Path, who_world: Path, scene: Scene
) -> None:
    run(config(release, who_world, keep_pictures=True, leave_out=(0,)))
    folder = release / "out" / "pictures" / "published"
    assert sorted(path.name for path in folder.iterdir()) == sorted(TARGETS)
    assert sorted(path.name for path in (folder / "joker").iterdir()) == [
        "001.png", "002.png", "003.png",
    ]  # fmt: skip
    latents = torch.from_numpy(np.load(release / "w_plus.npy"))
    direction = torch.from_numpy(np.load(release / "dirs" / "Joker.npy"))
    [expected] = tensor_to_pictures(scene.render(latents[2:3] + 1.2 * direction))
    made = read_picture(folder / "joker" / "002.png")
    assert np.abs(np.asarray(made, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_methods_find_directions_beside_the_published_ones(
    release: Path, who_world: Path, reading_mapper: Path
) -> None:
    asked = config(
        release,
        who_world,
        methods=("mapper", "one-direction", "latent-blending"),
        mapper=reading_mapper,
        references=release / "ffhq",
    )
    report = run(asked)
    assert [*report["methods"]] == ["published", "mapper", "one-direction", "latent-blending"]
    assert report["methods"]["mapper"] != report["methods"]["one-direction"]
    assert report == json.loads((release / "out" / "report.json").read_text())
    text = (release / "out" / "report.md").read_text()
    assert text == protocol_text(report)
    head = "| method | semantic | identity, as released | identity, corrected | identity to the"
    assert head in text and "4 pictures to compare with" in text and "| published | " in text
    written = {path: path.stat().st_mtime_ns for path in (release / "out" / "answers").iterdir()}
    assert len(written) == 3  # of each method
    assert run(asked)["methods"] == report["methods"]
    assert written == {path: path.stat().st_mtime_ns for path in written}  # not found again
    alone = run(config(release, who_world, direction=None, mapper=reading_mapper))
    assert [*alone["methods"]] == ["mapper"]
    assert alone["methods"]["mapper"]["semantic"] == report["methods"]["mapper"]["semantic"]


# Files


def test_what_is_left_out_is_named(
    release: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = release / "dirs" / "targets"
    (targets / "broken.png").write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(targets / "nobody.png")
    (release / "ffhq" / "9.png").write_bytes(b"x")
    (release / "dirs" / "alone.npy").write_bytes(b"x")
    report = run(config(release, tiny_world, references=release / "ffhq"))
    assert report["references"] == 4 and len(report["targets"]) == 2
    assert set(means(report)) == {"semantic", "fid"}
    said = capsys.readouterr().err
    for words in ("alone.npy: left out", "broken.png", "nobody.png: left out", "9.png"):
        assert [note for note in report["notes"] if words in note] and words in said
    assert "identity is not scored: world tiny names no identity model" in report["notes"]


def test_what_cannot_be_is_refused_in_one_line(
    release: Path, who_world: Path, tmp_path: Path
) -> None:
    np.save(release / "wide.npy", np.zeros((2, 3, 512), np.float32))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"results": (release,)}, "--results: --protocol targetclip edits the sources itself"),
        ({"methods": ("mappper",)}, "--methods: .*did you mean 'mapper'"),
        ({"methods": ("ridge",)}, "--methods: expected some of .*found 'ridge'"),
        ({"mapper": release / "m.safetensors"}, "--mapper: no method asks it"),
        ({"direction": None}, "--mapper: expected a mapper's file"),
        ({"sources": release / "dirs"}, "--sources: .*expected a file name ending in .npy or .pt"),
        ({"sources": release / "no.npy"}, "--sources: no file at"),
        ({"sources": release / "wide.npy"}, "--sources: .*the generator's W"),
        ({"leave_out": (4,)}, "--leave-out: expected 0 to 3, found 4"),
        ({"leave_out": (0, 1, 2)}, "--sources: expected two latents or more, found 1"),
        ({"targets": release / "no"}, "--targets: expected a folder, found none"),
        ({"direction": release / "no"}, "--direction: expected a folder, found none"),
        ({"direction": release / "ffhq"}, "expected .npy files"),
        ({"references": release / "no"}, "--references: expected a folder of pictures"),
        ({"protocol": "pictures"}, "--direction is of --protocol targetclip"),
        ({"protocol": "pictures", "direction": None}, "--results: expected folders or tables"),
    ]
    for changes, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            run(config(release, who_world, **changes))
        assert "\n" not in str(caught.value)
    assert {"mapper", "paper", "release", "identity"} <= {*KNOWN}
