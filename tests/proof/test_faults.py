"""The proof by fault, in a short version; the long one is the same code with larger numbers."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from pairs_made import FEATURES, pair
from tqdm import tqdm

from data.pairs import Pair, chunk_bytes
from tests.proof.damage import KINDS
from tests.proof.faults import STAGES, Config, DisturbedBuild, judge, outcome

ROOT = Path(__file__).parents[2]
TARGETS, KILLS, SPOILS = 8, 6, 1


def trial_of(out: Path, **changes: Any) -> DisturbedBuild:
    trial = DisturbedBuild(Config(out=out, targets=TARGETS, **changes), tqdm(disable=True))
    trial.usual = dict.fromkeys(STAGES, 1.0)
    return trial


def write_pairs(out: Path, pairs: list[Pair]) -> None:
    """A dataset without more than is compared: one shard."""
    (out / "data").mkdir(parents=True)
    table = pq.read_table(pa.BufferReader(chunk_bytes(pairs, [], FEATURES)))
    pq.write_table(table, out / "data/train-00000-of-00001.parquet")


def test_a_disturbed_build_gives_the_dataset_of_an_undisturbed_one(tmp_path: Path) -> None:
    out = tmp_path / "faults"
    numbers = f"--targets {TARGETS} --kills {KILLS} --stalls 1 --spoils {SPOILS} --steps 5"
    quick = "--lease 1 --checkpoint-seconds 0.02"
    # In a process of its own, since this one's torch has threads and cannot be forked.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.proof.faults",
            "--out",
            str(out),
            *f"{numbers} {quick}".split(),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = json.loads((out / "report.json").read_text())
    assert (done.returncode, report["wrong"]) == (0, [])
    assert done.stdout.count("\n") == 1 and "8 of 8 pairs equal" in done.stdout
    assert (report["kills"], report["stalls"], report["chunks"]) == (KILLS, 1, TARGETS)
    assert report["pairs"] == report["pairs_equal"] == TARGETS
    assert report["damages_named"] == report["damages"]
    log = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    kinds = [fault["kind"] for fault in log]
    assert kinds.count("kill") == KILLS and kinds.count("stall") == 1
    assert kinds.count("full disk") == 2 and kinds.count("other settings") == 1
    assert sum(report["faults"].values()) == len(log)


def test_a_changed_row_of_the_disturbed_build_is_not_equal(tmp_path: Path) -> None:
    trial = trial_of(tmp_path)
    pairs = [pair(i) for i in range(TARGETS)]
    write_pairs(tmp_path / "reference", pairs)
    pairs[5] = replace(pairs[5], loss=pairs[5].loss + 0.5)
    write_pairs(trial.build.out, pairs)
    judged = judge(trial, tmp_path / "reference")
    assert trial.wrong == [f"{pair(5).id}: loss differ"]
    assert (judged["pairs"], judged["pairs_equal"]) == (8, 7)
    assert judged["damages_named"] == {}


def test_an_empty_dataset_is_not_equal_to_an_empty_one(tmp_path: Path) -> None:
    trial = trial_of(tmp_path)
    judge(trial, tmp_path / "reference")
    assert trial.wrong == ["expected 8 pairs, found 0"]


def test_a_published_chunk_that_changes_or_vanishes_is_noticed(tmp_path: Path) -> None:
    trial = trial_of(tmp_path)
    chunks = trial.build.work / "chunks"
    chunks.mkdir(parents=True)
    for name in ("000000.parquet", "000001.parquet", "000002.parquet"):
        (chunks / name).write_bytes(b"rows")
    trial.watch()
    trial.watch()
    assert trial.wrong == []
    (chunks / "000000.parquet").unlink()
    (chunks / "new").write_bytes(b"rows")
    os.replace(chunks / "new", chunks / "000001.parquet")
    trial.watch()
    assert [line.split()[-3] for line in trial.wrong] == ["000000.parquet", "000001.parquet"]


def test_what_is_wrong_ends_the_command_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = {"kills": 1, "stalls": 0, "rounds": 1, "seconds": 1.0, "pairs": 8, "pairs_equal": 7}
    report |= {"damages_named": {}, "wrong": ["row 5: loss differ", "another"]}
    assert outcome(report) == 1
    assert capsys.readouterr().err == (
        "python -m tests.proof.faults: error: 2 not as expected, the first: row 5: loss differ\n"
    )
    assert outcome({**report, "wrong": []}) == 0
    assert capsys.readouterr().err == ""


def points_of_code() -> set[str]:
    """Return every name that an `at` is called with."""
    sources = [path.read_text() for path in (ROOT / "data").glob("*.py")]
    return {name for text in sources for name in re.findall(r'\bat\("([a-z-]+)"\)', text)}


def test_faults_come_at_every_point_of_the_code_and_at_half_of_them_by_time(tmp_path: Path) -> None:
    trial = trial_of(tmp_path)
    drawn = [trial.draw(stage, random.Random(i)) for stage in STAGES for i in range(400)]
    by_place = [fault for fault in drawn if fault.place != "time"]
    # Reached only where two want one claim at the same time: tested by the claims' own tests.
    races = {"before-look", "before-return", "after-removal"}
    assert {fault.place for fault in by_place} == points_of_code() - races
    assert 0.4 < len(by_place) / len(drawn) < 0.6


def test_the_same_seed_draws_the_same_faults(tmp_path: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        trial = trial_of(tmp_path, seed=seed)
        return [trial.draw("run", random.Random(f"{seed} {i}")) for i in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("targets", 7), ("kills", 0), ("stalls", -1), ("lease", 0.0), ("lease", float("nan"))],
)
def test_a_bad_number_is_named(tmp_path: Path, flag: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{flag}: expected") as caught:
        Config(out=tmp_path, **{flag: value})
    assert "\n" not in str(caught.value)


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out: expected a new or empty folder"):
        Config(out=tmp_path)


def test_all_kinds_of_damage_are_tried() -> None:
    assert set(KINDS) == {"flipped", "truncated", "removed", "swapped", "extra"}
