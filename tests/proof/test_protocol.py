"""The release's protocol at 1024 px, with few channels, a small CLIP and four of the latents."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import module_exit_code

from eval import referee
from tests.proof.protocol import Config, check, run


def run_here(words: list[str], log: Path) -> float:
    """Run the command in this process, whose imports are done."""
    assert words[:2] == ["-m", "eval.referee"]
    assert module_exit_code(referee, *words[2:]) == 0
    return 0.5


def test_the_numbers_of_the_protocol_are_those_of_its_pictures(
    clip_dir: Path, tmp_path: Path
) -> None:
    config = Config(out=tmp_path / "out", sources=2, channels=8, clip=clip_dir)
    report = run(config, run_here)
    assert np.load(config.out / "w_plus.npy").shape == (2, 18, 512)
    assert np.load(config.out / "dirs" / "1.npy").shape == (1, 18, 512)
    proof = json.loads((config.out / "proof.json").read_text())
    assert proof["report"] == report["methods"]["published"] and proof["peak_gib"] == 0.5
    # The direction of nothing keeps all identity, and pictures that FID compares with.
    identity, fid = (proof["report"][score] for score in ("identity", "fid"))
    assert identity["mean"] + identity["deviation"] == pytest.approx(100, abs=0.01)
    assert identity["deviation"] > 0.2 and fid["deviation"] > 0.5
    assert fid["mean"] - fid["deviation"] == pytest.approx(0, abs=0.01)

    def changed(**facts: Any) -> None:
        check(config, report | facts, proof["pictures"])

    methods = deepcopy(report["methods"])
    methods["published"]["identity"]["deviation"] += 0.2
    for facts, said in (
        ({"methods": methods}, "identity, deviation: the pictures have"),
        ({"methods": {"published": {}}}, "expected the scores"),
        ({"notes": ["left out"]}, "notes: expected"),
    ):
        with pytest.raises(ValueError, match=said):
            changed(**facts)
    with pytest.raises(ValueError, match="--out: expected an empty folder"):
        run(config, run_here)
