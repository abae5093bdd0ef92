"""The measures of the bundled world, on networks of random weights."""

import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch

from eval.reader import AvatarReader
from eval.studies.world_quality import Config, agreement, decibels, run
from eval.truth import truth_of


def test_decibels_are_of_the_range_of_values() -> None:
    truth = torch.zeros(2, 3, 8, 8)
    assert decibels(truth + 0.2, truth) == pytest.approx(20)
    assert decibels(truth + 0.02, truth) == pytest.approx(40, abs=1e-4)


def test_a_reader_that_always_says_the_same_is_right_about_faces_that_show_it() -> None:
    reader, first = AvatarReader().requires_grad_(False), (0,) * 12
    for parameter in reader.parameters():
        parameter.zero_()
    truth = truth_of([first, (*first[:6], 1, *first[7:])])
    right = agreement(reader, torch.zeros(2, 3, 128, 128), truth)
    assert right["top"] == right["hat"] == right["skinColor"] == 1 and right["eyes"] == 0.5
    assert right["identity"] == pytest.approx(1 - 0.5 / 6)


def test_every_way_to_make_a_face_is_measured_and_shown(face_world: Path, tmp_path: Path) -> None:
    config = Config(out=tmp_path / "out", world=str(face_world), faces=32)
    with redirect_stdout(StringIO()):
        report = run(config)
    assert json.loads((config.out / "report.json").read_text()) == {"faces": 32, **report}
    assert list(report) == ["drawn", "from codes", "from z", "inverted"]
    assert all(math.isfinite(row["psnr"]) for row in report.values() if row is not report["drawn"])
    names = {path.name for path in config.out.glob("*.png")}
    assert {"from_codes.png", "inverted.png", "interpolated.png", "layers.png"} <= names
    with pytest.raises(ValueError, match="--faces: expected 32 or more"):
        run(replace(config, faces=8))
