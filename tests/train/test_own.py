"""From a checkpoint to a mapper in one command: what it plans, skips, resumes and reports."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import module_exit_code

from predictor.mapper import Mapper, load_mapper
from targetclip.command import STOPPED, Stop, Stopped
from targetclip.recipes import RECIPES
from targetclip.world import load_world
from train import loop, own
from train.own import HUB, MAPPER, PLAN, PROGRESS, REPORT, Config, run
from train.own_plan import Facts, flags_of, stages_of

SMALL = {
    "pairs": 40,
    "steps": 4,
    "precision": "fp32",
    "build_flags": "--steps 2 --batch-size 20 --held-out 2",
    "train_flags": "--targets generated:20@17 --validation generated:2@23 --width 16 --depth 1 "
    "--batch-size 2 --sources 2 --pairs-batch-size 8 --correction 4 --evaluate-every 3",
    "calibrate_flags": "--targets generated:60@29 --count 2 --fitted 6 --sources 2 --probes 2",
    "compare_flags": "--targets 2 --slow 1 --sources 2 --references 4 --max-steps 2",
}
# A stage that says who it works with, and waits or fails as it is told.
STAGE = """import os, pathlib, sys, time
rank = os.environ.get("RANK", "0")
try:
    pathlib.Path(sys.argv[1], rank).write_text(
        os.environ.get("WORLD_SIZE", "1") + " " + os.environ.get("MASTER_PORT", "none")
    )
    if rank != "0":
        sys.exit(int(sys.argv[3]))
    time.sleep(float(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
"""


class Here:
    """Runs stages in this process, and remembers which."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def __call__(self, words: Sequence[str], processes: int, stop: Stop) -> int:
        self.begun.append(words[0])
        return module_exit_code(import_module(words[0]), *words[1:])


@pytest.fixture
def small(tiny_world: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations of seconds."""

    def make(**changes: Any) -> Config:
        return Config(**{"out": tmp_path / "out", "world": str(tiny_world), **SMALL, **changes})

    return make


# The whole way


def test_a_checkpoint_becomes_a_calibrated_mapper_though_it_was_stopped_on_the_way(
    small: Callable[..., Config],
    who_world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("consistent", "identity"):
        quick = replace(RECIPES[name], steps=5, sources=2, fresh_sources=False)
        monkeypatch.setitem(RECIPES, name, quick)
    world = who_world.with_name("own.toml")
    world.write_text(who_world.read_text().replace('"consistent"', '"identity"'))
    changes = {"world": str(world), "build_flags": SMALL["build_flags"] + " --recipe consistent"}
    config, first, second, third = small(**changes), Here(), Here(), Here()
    out, log = config.out, loop.Trainer.log

    def log_and_stop(trainer: loop.Trainer[Any], *figures: Any) -> None:
        log(trainer, *figures)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(small(**changes, plan=True)) == 0
    planned, said = json.loads((out / PLAN).read_text()), capfd.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == [
        *("pairs", "train", "tradeoff", "calibrate", "compare", "left")
    ]
    assert all(stage["seconds"] > 0 for stage in planned["stages"])

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "log", log_and_stop)
        assert run(config, first) == STOPPED
    assert first.begun == ["train.own", "data.build", "train.mapper"]
    assert not (out / "mapper/mapper.safetensors").exists()
    assert run(config, second) == 0
    assert second.begun == [
        *("train.own", "train.mapper", "train.mapper", "eval.calibrate", "eval.compare")
    ]
    assert "timing" in said.err and "timing" not in capfd.readouterr().err
    lines = (out / "mapper/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 5]

    mapper, record = load_mapper(out / MAPPER)
    assert record.calibration["threshold"] and mapper.config.correction is not None
    assert mapper.config.tradeoff is not None and mapper.keep == mapper.config.tradeoff.origin
    assert mapper.keep_gain is not None and mapper.keep_gain.weight.any()
    begun = load_mapper(out / "mapper/mapper.safetensors")[0].directions_of_differences
    stretched = record.calibration["stretch"] * begun(rows := torch.randn(2, 32))
    found = mapper.directions_of_differences(rows)
    assert float((found - stretched).norm() / stretched.norm()) < 0.01  # half precision
    assert "python -m eval.calibrate" in record.command
    assert Mapper.from_pretrained(out / HUB).fingerprint
    report = (out / REPORT).read_text()
    for name in (MAPPER, "mapper/grid.png", "compare/report.md", f"{HUB}/README.md"):
        assert name in report and (out / name).is_file()
    assert "| mapper | " in report and " [" in report and "python -m train.own --out" in report
    progress = json.loads((out / PROGRESS).read_text())
    assert all(f"| {name} | " in report and row["done"] for name, row in progress.items())

    assert run(config, third) == 0 and third.begun == ["train.own"]
    assert capfd.readouterr().out.count(" done ") == 5
    assert run(small(**changes, tradeoff_steps=0), Here()) == 1
    assert "calibrate.--mapper" in capfd.readouterr().err
    assert run(small(**changes, seed=1), Here()) == 1
    assert "pairs.--seed: planned '0', found '1'" in capfd.readouterr().err


# Plans


FACTS = Facts(
    files={},
    device="cuda H100",
    accelerator=True,
    precision="bf16",
    resolution=1024,
    pictures=50,
    folder=None,
    batch=4,
    image=0.01,
    search=0.1,
    passes={"256": 0.02, "None": 0.05},
)


def words_by_stage(config: Config, facts: Facts) -> dict[str, dict[str, str]]:
    stages = stages_of(config, load_world(config.world), facts)
    return {stage.name: flags_of(stage.words) for stage in stages}


def test_large_generators_are_searched_at_the_size_that_clip_sees(
    small: Callable[..., Config],
) -> None:
    config = small(train_flags="", build_flags="", steps=None)
    large = words_by_stage(config, FACTS)
    assert large["pairs"]["--render-size"] == "256"
    assert large["train"]["--schedule"] == "pairs:400 transfer@256:3600 transfer:400"
    assert large["train"]["--precision"] == large["compare"]["--precision"] == "bf16"
    whole = words_by_stage(config, replace(FACTS, resolution=256))
    assert "--render-size" not in whole["pairs"] and "@" not in whole["train"]["--schedule"]
    processor = words_by_stage(config, replace(FACTS, resolution=128, accelerator=False))
    assert processor["train"]["--schedule"] == "pairs:100 transfer@64:900 transfer:100"


def test_the_trade_off_is_learned_where_the_recipe_weighs_identity(
    small: Callable[..., Config], who_world: Path
) -> None:
    assert "tradeoff" not in words_by_stage(small(), FACTS)
    world = who_world.with_name("weighs.toml")
    world.write_text(who_world.read_text().replace('"consistent"', '"identity"'))
    config = small(world=str(world), steps=None)
    flags = words_by_stage(config, FACTS)
    its, recipe = flags["tradeoff"], RECIPES["identity"]
    assert its["--schedule"] == "transfer@256:1800 transfer:200"
    assert its["--start"] == "mapper/mapper.safetensors" and "--bank" not in its
    assert flags["calibrate"]["--mapper"] == "tradeoff/mapper.safetensors"
    for name in ("--targets", "--validation", "--batch-size", "--sources", "--evaluate-every"):
        assert its[name] == flags["train"][name]
    ends = [float(end) for end in its["--keep-identity-weights"].split()]
    assert ends == pytest.approx([recipe.identity_weight / 3, recipe.identity_weight / 0.15])
    shorter = config.train_flags + " --direction-decay 0.003"
    changed = replace(config, tradeoff_steps=20, train_flags=shorter)
    its = words_by_stage(changed, FACTS)["tradeoff"]
    assert its["--keep-identity-decays"] == "0.001 0.03" and its["--schedule"].endswith(":2")
    with pytest.raises(ValueError, match="--tradeoff-steps: expected a world with an identity"):
        words_by_stage(small(tradeoff_steps=5), FACTS)
    ends = " --keep-identity-weights 0.1 1 --keep-identity-decays 0.001 0.1"
    learned = replace(config, train_flags=config.train_flags + ends)
    assert "tradeoff" not in words_by_stage(learned, FACTS)
    with pytest.raises(ValueError, match="a first training at one identity weight"):
        words_by_stage(replace(learned, tradeoff_steps=5), FACTS)
    for none in (
        {"tradeoff_steps": 0},
        {"train_flags": config.train_flags + " --identity-weight 0"},
    ):
        assert "tradeoff" not in words_by_stage(replace(config, **none), FACTS)


def test_where_memory_is_short_every_stage_renders_fewer_images(
    small: Callable[..., Config],
) -> None:
    roomy, tight = (words_by_stage(small(), replace(FACTS, fits=n)) for n in (1000, 3))
    assert not [name for name, flags in roomy.items() if "--max-images" in flags]
    assert [flags["--max-images"] for flags in tight.values()] == ["3"] * 4
    given = words_by_stage(small(max_images=2), FACTS)
    assert [flags["--max-images"] for flags in given.values()] == ["2"] * 4


def test_pictures_of_ones_own_give_pairs_are_learned_from_and_judge(
    small: Callable[..., Config],
) -> None:
    changes = {"targets": ("pics", "dataset:more"), "train_flags": "", "pairs": 7}
    flags = words_by_stage(small(**changes), replace(FACTS, folder="pics"))
    assert (flags["pairs"]["--targets"], flags["pairs"]["--sample"]) == ("pics dataset:more", "4")
    assert flags["train"]["--targets"].startswith("pics dataset:more generated:25000@17 mixed:")
    assert flags["compare"]["--folder"] == "pics"
    without = words_by_stage(small(pairs=0), FACTS)
    assert "pairs" not in without and without["train"]["--schedule"].startswith("differences:1 ")


def test_more_processes_build_sooner_and_estimates_add_up(small: Callable[..., Config]) -> None:
    world = load_world(small().world)
    one, two = (stages_of(small(), world, FACTS, count)[0] for count in (1, 2))
    assert (
        one.seconds == pytest.approx(40 * (2 * 0.1 + 17 * 0.01)) == pytest.approx(2 * two.seconds)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_flags": "--batch-sise 3"}, "unknown option --batch-sise"),
        ({"build_flags": "--recipe identity"}, "has an identity loss"),
        ({"calibrate_flags": "--count many"}, "--count: expected a whole number, found 'many'"),
        ({"targets": ("held-out:4",)}, "kept for tests"),
        ({"world": "nowhere.toml"}, "no such world file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    changes: dict[str, Any],
    message: str,
    small: Callable[..., Config],
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = small(**changes)
    flags = own.words_of("", "", **{**vars(config), "plan": True})[1:]
    assert module_exit_code(own, *flags) in (1, 2)
    assert message in capfd.readouterr().err
    assert not (config.out / PLAN).exists()


# Processes


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stage of two seconds and more that is no training, to be told how long and how it fails."""
    (tmp_path / "stand_in.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["stand_in", str(tmp_path)]


def test_processes_of_a_stage_know_each_other_and_one_alone_nobody(
    stage: list[str], tmp_path: Path
) -> None:
    assert own.call([*stage, "0", "0"], 2, Stop()) == 0
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert first == second and first.startswith("2 ")
    assert own.call([*stage, "0", "0"], 1, Stop()) == 0
    assert (tmp_path / "0").read_text() == "1 none"


def test_a_process_that_fails_ends_the_others_and_gives_the_exit_code(stage: list[str]) -> None:
    assert own.call([*stage, "60", "3"], 2, Stop()) == 3


def test_a_stage_is_told_to_stop_once_and_says_so_itself(stage: list[str], tmp_path: Path) -> None:
    stop = Stop()

    def ask_once_it_runs() -> None:
        while not (tmp_path / "0").exists():
            time.sleep(0.02)
        stop.ask(signal.SIGTERM, None)

    asking = threading.Thread(target=ask_once_it_runs)
    asking.start()
    assert own.call([*stage, "60", "0"], 1, stop) == STOPPED
    asking.join()
    assert own.ended("train", STOPPED, stop) == STOPPED


def test_an_end_that_no_stage_explains_is_explained() -> None:
    with pytest.raises(ChildProcessError, match=r"train: .* killed by signal 9, .*--max-images"):
        own.ended("train", -9, Stop())
    stop = Stop()
    stop.ask(signal.SIGINT, None)
    with pytest.raises(Stopped):
        own.ended("train", -signal.SIGINT, stop)
    assert own.ended("train", 2, Stop()) == 2


def test_of_a_launch_the_first_process_does_all_and_several_machines_are_refused(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(small()) == 0 and not small().out.exists()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="on one machine, found 1 of 2"):
        run(small())
