"""Folders of edits of the challenge's sources, by methods of the comparison."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_runs import module_exit_code
from PIL import Image

from data.illustrated.codes import draw_face
from data.targets import draw_avatar, face_at
from eval.studies import challenge as challenge_study
from eval.studies.challenge import Config, run
from targetclip.media.images import read_picture, tensor_to_pictures
from targetclip.scene import Scene

TARGETS, SOURCES = ("a", "b"), ("x", "y")


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    """A challenge of two targets and two sources."""
    for i, name in enumerate(TARGETS):
        (tmp_path / "c" / "targets").mkdir(parents=True, exist_ok=True)
        draw_avatar("held-out", 41, i).save(tmp_path / "c" / "targets" / f"{name}.png")
    (tmp_path / "c" / "targets" / "truth.json").write_text("{}")
    for i, name in enumerate(SOURCES):
        (tmp_path / "c" / "sources").mkdir(parents=True, exist_ok=True)
        face = Image.fromarray(draw_face(face_at(41, i))[0])
        face.save(tmp_path / "c" / "sources" / f"{name}.png")
    return tmp_path / "c"


def answered(out: Path) -> dict[str, int]:
    """When each kept answer was written."""
    return {path.name: path.stat().st_mtime_ns for path in (out / "answers").iterdir()}


def test_every_method_leaves_a_picture_of_each_target_and_source(
    challenge: Path, face_world: Path, scene: Scene
) -> None:
    out = challenge.parent / "out"
    config = Config(
        out=out,
        challenge=challenge,
        methods=("unedited", "identity", "latent-blending"),
        world=str(face_world),
        max_steps=2,
        precision="bf16",
    )
    run(config)
    folders = {path.name for path in out.iterdir()} - {"answers"}
    assert folders == {"unedited", "identity-2-steps", "latent-blending"}
    pairs = [f"{target}/{source}.png" for target in TARGETS for source in SOURCES]
    for folder in folders:
        found = sorted(
            p.relative_to(out / folder).as_posix() for p in (out / folder).rglob("*.png")
        )
        assert found == pairs
    sources = [read_picture(challenge / "sources" / f"{name}.png") for name in SOURCES]
    rendered = tensor_to_pictures(scene.render(scene.invert(sources)))
    for target in TARGETS:
        for source, picture in zip(SOURCES, rendered, strict=True):
            made = read_picture(out / "unedited" / target / f"{source}.png")
            assert np.abs(np.asarray(made, np.int16) - np.asarray(picture, np.int16)).max() <= 1
            other = read_picture(out / "latent-blending" / target / f"{source}.png")
            assert other.tobytes() != made.tobytes()
    # What is answered is not searched again.
    searched = answered(out)
    assert searched
    (out / "identity-2-steps" / "a" / "x.png").unlink()
    run(config)
    assert answered(out) == searched
    made = (out / "identity-2-steps" / "a" / "x.png").read_bytes()
    # Nor on another machine, to which answers alone are copied.
    shutil.copytree(out / "answers", out.with_name("copy") / "answers")
    run(dataclasses.replace(config, out=out.with_name("copy")))
    assert answered(out.with_name("copy")) == searched
    assert (out.with_name("copy") / "identity-2-steps" / "a" / "x.png").read_bytes() == made
    run(dataclasses.replace(config, precision="fp32"))
    assert answered(out) != searched


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("mappper",), "--methods: .*found 'mappper': did you mean 'mapper'"),
        (("own-mapper",), "--methods: expected some of .*found 'own-mapper'"),
        (("nearest-neighbour",), "there are no pairs"),
        (("mapper",), "--mapper: expected a mapper's file"),
    ],
)
def test_methods_that_cannot_be_run_are_refused_in_one_line(
    challenge: Path, face_world: Path, methods: tuple[str, ...], message: str
) -> None:
    config = Config(
        out=challenge.parent / "out", challenge=challenge, methods=methods, world=str(face_world)
    )
    with pytest.raises(ValueError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)


def test_the_command_refuses_what_is_no_challenge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--out", tmp_path / "out", "--challenge", tmp_path)
    assert module_exit_code(challenge_study, *arguments) == 1
    assert "error: --challenge: expected a folder of pictures" in capsys.readouterr().err
