"""The command that builds pairs: one line makes a dataset, and no end of it changes the result."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import slurm_jobs
import torch
from builds_made import config, ids, leftovers, long_ago, pictures, rows
from trackers_read import scalars_of

from data import build
from data.build import Config, run
from data.card import SUMS
from data.claims import create
from data.dataset import verify
from data.plan import load_plan
from data.targets import draw_avatar, open_targets, split_of
from targetclip import tracking
from targetclip.command import SIGNALS, Stopped, main
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, save_identity
from targetclip.optimize import optimize_directions
from targetclip.world import load_scene, load_world

ROOT = Path(__file__).parents[2]
PROG = "python -m data.build"
STOPPED = f"{PROG}: stopped; what was done is kept\n"
Command = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A build listens to signals for the rest of its process."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def built(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of five drawn faces that nothing happened to."""
    out = tmp_path_factory.mktemp("built") / "pairs"
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert run(config(tiny_world, out)) == 0
    for number, handler in before.items():
        signal.signal(number, handler)
    return out


def arguments(settings: Config) -> list[str]:
    """A configuration as it is given on a command line."""
    flags: list[str] = []
    for name, value in asdict(settings).items():
        if value not in (None, ()) and value is not False:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process: its exit code, and its errors and warnings."""

    def run_command(flags: list[str]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(run, Config, build.__doc__, "python -m data.build", flags)
        assert isinstance(ended.value.code, int)
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        progress = ("%|", "loading world", "; next: ")
        messages = [line + "\n" for line in lines if line and not any(p in line for p in progress)]
        return ended.value.code, "".join(messages)

    return run_command


def copied(built: Path, tmp_path: Path) -> Path:
    """A build's folder, to change."""
    out = tmp_path / "pairs"
    subprocess.run(["cp", "-r", str(built), str(out)], check=True)
    return out


def digests(out: Path) -> dict[str, str]:
    """What a user of the dataset gets, by file."""
    files = [path for path in out.rglob("*") if path.is_file() and ".build" not in path.parts]
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# One command


def test_one_command_makes_a_dataset_that_loads_and_is_whole(built: Path, tmp_path: Path) -> None:
    assert run(Config(out=built, only="verify")) == 0 and verify(built) == []
    loaded = datasets.load_dataset(str(built), cache_dir=str(tmp_path))
    counts = {split: len(pairs) for split, pairs in loaded.items()}
    assert sum(counts.values()) == 5
    for pairs in loaded.values():
        row = pairs.with_format("torch")[0]
        assert row["embedding"].shape == (32,) and row["direction"].shape == (6, 8)
        assert row["coefficients"].shape == (6,)
        assert float(row["embedding"].norm()) == pytest.approx(1, abs=1e-5)
    assert len(set(ids(built))) == 5
    assert leftovers(built) == []


def test_the_report_says_what_is_in_the_dataset_and_what_it_is_made_with(built: Path) -> None:
    report = json.loads((built / "report.json").read_text())
    assert {split: found["pairs"] for split, found in report["splits"].items()} == {
        name.partition("-")[0]: len(found) for name, found in rows(built).items()
    }
    for name, found in rows(built).items():
        mean = sum(row["held_out_transfer"] for row in found) / len(found)
        scores = report["splits"][name.partition("-")[0]]
        assert scores["held_out_transfer"] == pytest.approx(mean)
    assert report["failures"] == 0 and report["batch_size"] == 2
    assert report["settings"]["recipe"]["steps"] == 3
    assert report["settings"]["targets"][0]["spec"] == "avataaars:5"
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_card_names_the_command_that_makes_the_dataset_again(
    built: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    card = (built / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("python -m data.build")]
    flags = shlex.split(line)[3:]
    assert flags[flags.index("--world") + 1] == "world.toml"
    flags[flags.index("--world") + 1] = str(tiny_world)
    flags[flags.index("--out") + 1] = str(tmp_path / "again")
    assert command(flags)[0] == 0
    assert rows(tmp_path / "again") == rows(built)


def test_the_same_command_again_changes_no_byte_of_the_dataset(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    out = copied(built, tmp_path)
    assert run(config(tiny_world, out)) == 0
    assert digests(out) == digests(built)


def test_a_tracked_build_is_the_same_and_sends_what_is_done(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    assert run(config(tiny_world, out, tracker="tensorboard")) == 0
    assert rows(out) == rows(built)
    [launch] = (out / ".build" / "trackers").iterdir()
    sent = scalars_of(launch)
    assert sent["targets_done"] == {2: 2.0, 4: 4.0, 5: 5.0}
    assert set(sent["failures"].values()) == {0.0}
    chunks = sorted((out / ".build" / "chunks").glob("*.parquet"))
    means = [pq.read_table(chunk)["loss"].to_numpy().mean() for chunk in chunks]
    assert sorted(sent["loss"].values()) == pytest.approx(sorted(means), rel=1e-5)


def test_a_build_does_not_begin_without_the_package_of_its_tracker(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"^--tracker: expected the package wandb"):
        run(config(tiny_world, tmp_path / "out", tracker="wandb"))
    assert not [*tmp_path.iterdir()]


def test_directions_are_those_of_the_optimizer_and_their_ids_decide_the_split(
    built: Path, tiny_world: Path
) -> None:
    # Found again from the targets, their seeds and the bank alone, all five together.
    world = load_world(str(tiny_world))
    scene = load_scene(world, torch.device("cpu"))
    by_id = {row["id"]: row for split in rows(built).values() for row in split}
    targets = list(open_targets("avataaars:5"))
    order = [by_id[target.id] for target in targets]  # type: ignore[union-attr]
    alone = optimize_directions(
        scene.generator,
        scene.embedder,
        scene.embedder.embed_pictures([target.picture for target in targets]),  # type: ignore[union-attr]
        scene.bank(),
        build.chosen_recipe(config(tiny_world, built), world)[1],
        torch.zeros(5, 6, 8),
        [row["seed"] for row in order],
    )
    directions = torch.tensor([row["direction"] for row in order])
    assert torch.allclose(directions, alone.directions, atol=1e-3)
    for name, split in rows(built).items():
        for row in split:
            assert name.startswith(f"{row['split']}-")
            assert row["split"] == split_of(row["id"])


def test_bad_pictures_and_duplicates_are_listed_and_everything_is_there_once(
    tiny_world: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "pairs", str(pictures(tmp_path / "faces"))
    targets = ("avataaars:2", folder, "avataaars:1")
    assert run(config(tiny_world, out, targets=targets, steps=1)) == 0
    found = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(failure["origin"], failure["stage"]) for failure in found] == [
        ("faces/broken.png", "decode"),
        ("faces/copy-of-a.png", "decode"),
        ("avataaars:0", "decode"),
    ]
    assert "not a picture" in found[0]["reason"]
    assert found[1]["reason"] == "duplicate of faces/a.png"
    assert found[2]["reason"] == "duplicate of avataaars:0"
    assert len(ids(out)) == len(set(ids(out))) == 4
    assert json.loads((out / "report.json").read_text())["failures"] == 3
    assert run(Config(out=out, only="verify")) == 0
    for name in ("README.md", "report.json", "failures.jsonl"):
        assert str(tmp_path) not in (out / name).read_text(), name
    # A touched file is read again and found to be the same; a changed one is not.
    os.utime(tmp_path / "faces" / "a.png", (1, 1))
    assert run(config(tiny_world, out, targets=targets, steps=1)) == 0
    draw_avatar("avataaars", 8, 0).save(tmp_path / "faces" / "b.png")
    with pytest.raises(ValueError, match=r"target set 1.identity"):
        run(config(tiny_world, out, targets=targets, steps=1))
    draw_avatar("avataaars", 8, 1).save(tmp_path / "faces" / "c.png")
    with pytest.raises(ValueError, match=r"target set 1.count: planned 4, found 5"):
        run(config(tiny_world, out, targets=targets, steps=1))


def test_the_report_counts_and_names_what_folders_hold_beside_pictures(
    tiny_world: Path, tmp_path: Path
) -> None:
    folders = [pictures(tmp_path / name) for name in ("faces", "more")]
    for folder, name in zip(folders, ("a.tif", "notes.txt"), strict=True):
        (folder / name).touch()
    settings = config(tiny_world, tmp_path / "pairs", targets=tuple(map(str, folders)), steps=1)
    assert run(settings) == 0
    (folders[0] / "b.txt").touch()  # is no target: the plan stays valid
    assert run(settings) == 0
    report = json.loads((settings.out / "report.json").read_text())
    assert report["not_taken"] == {"count": 2, "files": ["faces/a.tif", "more/notes.txt"]}


def test_stages_can_be_run_one_at_a_time(
    built: Path, tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs"
    assert run(config(tiny_world, out, only="plan")) == 0
    assert not (out / ".build" / "chunks").exists()
    with pytest.raises(FileNotFoundError, match=r"3 of 3 chunks are not done, 000000 the first"):
        run(config(tiny_world, out, only="merge"))
    assert run(config(tiny_world, out, only="run")) == 0
    assert not (out / "README.md").exists()
    assert run(config(tiny_world, out, only="verify")) == 1
    assert "SHA256SUMS" in capsys.readouterr().out
    assert run(config(tiny_world, out, only="merge")) == 0
    assert run(config(tiny_world, out, only="verify")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: clean"
    assert rows(out) == rows(built)


def test_verify_knows_the_plan_and_tells_what_is_wrong_with_it(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(built, tmp_path)
    targets = out / ".build" / "plan" / "targets.jsonl"
    content = targets.read_text()
    targets.write_text(content.replace(ids(out)[0], "0" * 16))
    assert run(Config(out=out, only="verify")) == 1
    output = capsys.readouterr().out
    assert "targets.jsonl: altered" in output and f"1 not expected: {ids(out)[0]}" in output
    targets.write_text(content[:-5])
    assert run(Config(out=out, only="verify")) == 1
    assert "targets.jsonl': expected" in capsys.readouterr().out


def test_the_bar_counts_a_target_only_once_it_is_done_and_ends_full(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    class Watched(build.tqdm):  # type: ignore[misc]
        def update(self, n: float = 1) -> None:
            super().update(n)
            if self.desc.startswith("targets"):
                seen.append(
                    (len(list((tmp_path / "pairs" / ".build" / "chunks").iterdir())), self.n)
                )

    monkeypatch.setattr(build, "tqdm", Watched)
    assert run(config(tiny_world, tmp_path / "pairs", steps=12)) == 0
    assert seen[-1] == (3, 5)
    for published, shown in seen:
        assert 2 * published - 1 <= shown <= 2 * (published + 1)
    assert len(seen) == 3 * 12 + 1


# Nothing else is mixed in


def test_a_folder_is_one_identity_models(who_world: Path, tmp_path: Path) -> None:
    made = config(
        who_world, tmp_path / "pairs", recipe="identity", steps=2, targets=("avataaars:2",)
    )
    assert run(made) == 0
    other = AvatarIdentity(IdentityConfig(16, (8, 8), 16, 5))
    folder = tmp_path / "other"
    shutil.copytree(who_world.parent, folder)
    save_identity(other, folder / "who.safetensors")
    with pytest.raises(ValueError, match="identity: planned '"):
        run(replace(made, world=str(folder / "who.toml")))


def test_a_plan_from_before_the_identity_loss_is_gone_on_with(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    shutil.copytree(built, out)
    paths = [path for path in (out / ".build").rglob("*.json") if "recipe" in path.read_text()]
    assert paths
    for path in paths:
        plan = json.loads(path.read_text())
        settings = plan.get("settings", plan)
        settings["recipe"].pop("identity_weight")
        settings.pop("identity")
        path.write_text(json.dumps(plan))
    assert run(config(tiny_world, out)) == 0


def test_the_cards_command_names_the_size_of_smaller_images_and_of_a_sample(
    built: Path, tiny_world: Path
) -> None:
    plan, asked = load_plan(built / ".build" / "plan"), config(tiny_world, built)
    assert "--render-size" not in build.command_line(asked, plan)
    recipe = plan.settings["recipe"] | {"render_size": 8}
    smaller = replace(plan, settings=plan.settings | {"recipe": recipe})
    flags = build.command_line(asked, smaller)
    assert flags[flags.index("--render-size") + 1] == "8"
    assert "--sample" not in flags
    flags = build.command_line(replace(asked, sample=3), plan)
    assert flags[flags.index("--sample") + 1] == "3"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 4}, "recipe.steps: planned 3, found 4"),
        ({"render_size": 8}, "recipe.render_size: planned None, found 8"),
        ({"seed": 1}, "seed: planned 0, found 1"),
        (
            {"recipe": "paper", "initial": "zero"},
            "recipe_name: planned 'consistent', found 'paper'",
        ),
        ({"initial": "random"}, "recipe.initial: planned 'zero', found 'random'"),
        ({"held_out": 3}, "held_out: planned 2, found 3"),
        ({"batch_size": 3}, "batch_size: planned 2, found 3"),
        (
            {"targets": ("avataaars:6",)},
            "target set 0.spec: planned 'avataaars:5', found 'avataaars:6'",
        ),
        (
            {"targets": ("avataaars:5@1",)},
            "target set 0.spec: planned 'avataaars:5', found 'avataaars:5@1'",
        ),
    ],
)
def test_other_settings_are_refused_by_name_and_touch_nothing(
    built: Path, tiny_world: Path, changes: dict[str, Any], named: str
) -> None:
    before = digests(built)
    with pytest.raises(ValueError, match=r"was planned with other settings") as caught:
        run(config(tiny_world, built, **changes))
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert digests(built) == before


def test_another_generator_is_refused_by_name(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    from targetclip.generators.rosinality import save_safetensors
    from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_safetensors(
            StyleGAN2(
                StyleGAN2Config(
                    resolution=16, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8, 8)
                )
            ),
            tmp_path / "other.safetensors",
        )
    lines = tiny_world.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("generator", "inverter"))]
    other = tmp_path / "world.toml"
    other.write_text("\n".join([*kept, 'generator = "other.safetensors"']))
    with pytest.raises(ValueError, match=r"\(generator: planned '\w+', found '\w+'\)"):
        run(config(other, built))
    with pytest.raises(ValueError, match=r"world 'tiny' has no inverter: give --initial zero"):
        run(config(other, tmp_path / "pairs", recipe="release"))


def test_a_worker_without_targets_joins_a_plan(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pairs"
    assert run(config(tiny_world, out, only="plan")) == 0
    assert run(config(tiny_world, out, targets=(), batch_size="auto")) == 0
    assert rows(out) == rows(built)


@pytest.mark.parametrize("only", [None, "run", "merge"])
def test_a_worker_without_targets_and_without_a_plan_is_told_so(
    tiny_world: Path, tmp_path: Path, command: Command, only: str | None
) -> None:
    targets = () if only is None else ("avataaars:5",)
    # What a planner left that was killed is not waited for.
    (tmp_path / ".build" / "draft.killed").mkdir(parents=True)
    code, error = command(arguments(config(tiny_world, tmp_path, targets=targets, only=only)))
    assert code == 1
    assert error == f"{PROG}: error: no plan in '{tmp_path}': plan first, by giving --targets\n"


def test_a_worker_waits_for_a_plan_that_is_being_made(
    built: Path, tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claims = tmp_path / ".build" / "claims"
    claims.mkdir(parents=True)
    assert create(claims / "plan", "other")

    def finish_plan() -> None:
        planned = subprocess.run(["cp", "-r", str(built / ".build" / "plan"), str(claims.parent)])
        assert planned.returncode == 0
        (claims / "plan").unlink()

    later = threading.Timer(1.5, finish_plan)
    later.start()
    assert run(config(tiny_world, tmp_path, targets=())) == 0
    later.join()
    assert rows(tmp_path) == rows(built)
    assert caplog.text.count("waiting for the plan of another process") == 1


def test_a_plan_that_another_made_meanwhile_is_checked_too(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    work = tmp_path / ".build"

    def plan_elsewhere(point: str) -> None:
        if point == "after-draft" and not (work / "plan").exists():
            subprocess.run(["cp", "-r", str(built / ".build" / "plan"), str(work)], check=True)

    with pytest.raises(ValueError, match=r"seed: planned 0, found 1"):
        run(config(tiny_world, tmp_path, seed=1), plan_elsewhere)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--recipe nope",
            "--recipe: expected one of release, paper, consistent, identity, found 'nope'",
        ),
        (
            "--recipe identity",
            "--recipe: 'identity' has an identity loss, and world 'tiny' no identity model",
        ),
        ("--batch-size 0", "--batch-size: expected 1 or more, found 0"),
        ("--held-out 1", "--held-out: expected 2 or more"),
        ("--targets held-out:5", "--targets: expected targets to learn from"),
        ("--render-size 12", "--render-size: expected a size in px of [4, 8, 16], found 12"),
        ("--lease nan", "--lease: expected seconds above 0, found nan"),
        ("--world nope", "unknown world 'nope'"),
        ("--targets nope", "expected targets as a folder of pictures"),
        ("--out {file}/pairs", "--out: cannot write into"),
        ("--out {file}", "--out: cannot write into"),
        (
            "--recipe papr",
            "--recipe: expected one of release, paper, consistent, identity, found 'papr': ",
        ),
        ("--licence (c)", "expected a licence by its name on the hub"),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(
    tiny_world: Path, tmp_path: Path, command: Command, flags: str, message: str
) -> None:
    (tmp_path / "file").touch()
    more = flags.format(file=tmp_path / "file").split()
    code, error = command([*arguments(config(tiny_world, tmp_path / "pairs")), *more])
    assert code == 1
    assert error.startswith(f"{PROG}: error: {message}")
    assert error.count("\n") == 1 and error.endswith("\n")


def test_a_usage_error_is_one_line_and_exit_code_2(command: Command) -> None:
    code, error = command(["--seed", "x"])
    assert code == 2 and error.startswith(PROG) and error.count("\n") == 1


# Precision


def test_half_precision_is_recorded_and_not_mixed_with_another(
    built: Path, tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pairs"
    assert run(config(tiny_world, out, precision="bf16", targets=("avataaars:2",))) == 0
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["precision"] == "bf16"
    assert json.loads((built / "report.json").read_text())["settings"]["precision"] == "no"
    # The launcher's variable says the same, and the flag is stronger.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert run(config(tiny_world, out, targets=("avataaars:2",))) == 0
    with pytest.raises(ValueError, match="precision: planned 'bf16', found 'no'"):
        run(config(tiny_world, out, precision="fp32", targets=("avataaars:2",)))
    half = {row["id"]: row for split in rows(out).values() for row in split}
    whole = {row["id"]: row for split in rows(built).values() for row in split}
    for name, row in half.items():
        assert row["embedding"] == whole[name]["embedding"]  # of the targets, always float32
        assert row["direction"] != whole[name]["direction"]


def test_a_precision_that_is_not_computed_is_refused(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="expected no or bf16, found 'fp16'"):
        run(config(tiny_world, tmp_path / "pairs"))
    assert not (tmp_path / "pairs").exists()


# Ends


DRIVER = """
import json, os, sys
import open_clip, torch, torch._dynamo  # so that no child has to
from data import build
from targetclip import command
from tests.proof.points import fault_at

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        at = fault_at(*order["fault"])
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["data.build", *order["flags"]]
        code = 70
        try:
            command.main(lambda config: build.run(config, at), build.Config, None, "data.build")
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., int]]:
    """Run a command in a process of its own, forked from one that has imported everything.

    A kill is a real SIGKILL, which nothing in the process can catch or tidy up after.
    """
    log = tmp_path_factory.mktemp("log") / "log"
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None

        def run_forked(settings: Config, place: str = "", count: int = 1) -> int:
            fault = (place, count)
            order = {"flags": arguments(settings), "fault": fault, "log": str(log)}
            print(json.dumps(order), file=driver.stdin, flush=True)
            code = int(driver.stdout.readline())  # type: ignore[union-attr]
            if code not in (0, -signal.SIGKILL):
                print(log.read_text())
            return code

        yield run_forked
        driver.stdin.close()


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("after-draft", 2),  # a full one, not yet a plan
        ("before-write", 4),  # plan.json
        ("after-claim", 2),  # of a chunk
        ("in-chunk", 2),
        ("after-checkpoint", 2),
        ("after-write", 6),  # a checkpoint
        ("after-link", 2),  # a chunk
        ("before-release", 3),  # of a chunk
        ("after-write", 22),  # in the merge
        ("before-sums", 1),
    ],
)
def test_a_build_that_is_killed_and_run_again_is_as_if_nothing_had_happened(
    built: Path,
    tiny_world: Path,
    tmp_path: Path,
    forked: Callable[..., int],
    place: str,
    count: int,
) -> None:
    settings = config(tiny_world, tmp_path / "pairs", checkpoint_seconds=1e-9)
    assert forked(settings, place, count) == -signal.SIGKILL
    # The claims of the dead would hold the next run up for a lease.
    long_ago(settings.out)
    assert forked(settings) == 0
    assert rows(settings.out) == rows(built)
    assert run(Config(out=settings.out, only="verify")) == 0
    assert leftovers(settings.out) == []


def test_a_build_that_is_asked_to_end_saves_its_work(
    built: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    points: list[str] = []

    def terminate(point: str) -> None:
        points.append(point)
        if points.count("in-chunk") == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = config(tiny_world, tmp_path)
    flags = arguments(settings)
    with pytest.raises(Stopped):
        run(settings, terminate)
    work = tmp_path / ".build"
    in_chunk = [point for point in points if point in ("in-chunk", "after-checkpoint")]
    assert in_chunk == ["in-chunk", "in-chunk", "after-checkpoint"]
    assert os.listdir(work / "claims") == [] and len(os.listdir(work / "checkpoints")) == 1
    begun = time.monotonic()
    assert command(flags) == (0, "")
    assert time.monotonic() - begun < 30  # and not a lease later
    assert rows(tmp_path) == rows(built) and leftovers(tmp_path) == []


def test_a_plan_that_is_asked_to_end_frees_its_claim_and_keeps_its_draft(
    built: Path, tiny_world: Path, tmp_path: Path, command: Command
) -> None:
    work = tmp_path / "pairs" / ".build"
    settings = config(tiny_world, tmp_path / "pairs")

    def end_twice(point: str) -> None:
        if point == "after-draft":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):  # of the second Ctrl-C
        run(settings, end_twice)
    assert os.listdir(work / "claims") == []

    def end(point: str) -> None:
        if point == "after-draft":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(settings, end)
    assert os.listdir(work / "claims") == []
    (draft,) = work.glob("draft.*")
    assert json.loads((draft / "draft.json").read_text())["taken"] == 5
    assert not (work / "plan").exists()
    assert command(arguments(settings)) == (0, "")
    assert leftovers(tmp_path / "pairs") == []
    assert rows(tmp_path / "pairs") == rows(built)


def test_a_command_that_is_stopped_says_so_in_one_line(
    built: Path, tmp_path: Path, command: Command, tiny_world: Path
) -> None:
    claims = tmp_path / ".build" / "claims"
    claims.mkdir(parents=True)
    assert create(claims / "plan", "other")  # which is waited for
    later = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    later.start()
    code, error = command(arguments(config(tiny_world, tmp_path)))
    later.join()
    assert code == 130 and error.splitlines(keepends=True)[-1] == STOPPED


# Several at once


def test_a_planner_that_lost_its_claim_stops_and_goes_on_once_it_has_it_back(
    built: Path,
    tiny_world: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    held, drafts = tmp_path / ".build" / "claims" / "plan", []

    def lose(point: str) -> None:
        if point != "after-draft":
            return
        draft = max((tmp_path / ".build").glob("draft.*/draft.json"), key=os.path.getmtime)
        drafts.append(json.loads(draft.read_text())["taken"])
        if len(drafts) == 1:
            held.unlink()
            assert create(held, "other")
            time.sleep(0.8)  # a heartbeat notices

    assert run(config(tiny_world, tmp_path, lease=2.0), lose) == 0
    # All were embedded when the loss was noticed, and the draft was kept.
    assert drafts == [0, 5, 5, 5]
    assert "waiting for the plan of another process" in caplog.text
    assert rows(tmp_path) == rows(built)


def test_what_the_dead_left_is_removed_and_what_may_be_of_the_living_is_not(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    out = copied(built, tmp_path)
    work = out / ".build"
    old = [work / "checkpoints" / "000000.dead.pt", out / "data" / ".train.1.ab.tmp"]
    old += [work / "claims" / "000001", work / "chunks" / ".000001.parquet.1.cd.tmp"]
    for path in old:
        path.touch()
    long_ago(out)
    young = [work / "checkpoints" / "000001.living.pt", work / "claims" / "000002"]
    for path in young:
        path.touch()
    assert run(config(tiny_world, out)) == 0
    assert leftovers(out) == [path.relative_to(out).as_posix() for path in young]
    assert digests(out) == digests(built)


def test_who_comes_second_to_the_merge_waits_and_does_not_merge_again(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    out = copied(built, tmp_path)
    claim_file = out / ".build" / "claims" / "merge"
    assert create(claim_file, "other")
    report = (out / "report.json").read_text().replace('"failures": 0', '"failures": 7')

    def end() -> None:
        (out / "report.json").write_text(report)
        claim_file.unlink()

    points: list[str] = []
    later = threading.Timer(1.0, end)
    later.start()
    assert run(config(tiny_world, out), points.append) == 0
    later.join()
    assert "before-sums" not in points  # a point of every merge
    assert (out / "report.json").read_text() == report and leftovers(out) == []


def test_a_job_that_slurm_stopped_is_finished_by_two_ranks_of_a_launch(
    built: Path, tiny_world: Path, tmp_path: Path
) -> None:
    settings = config(tiny_world, tmp_path / "pairs", checkpoint_seconds=1e-9)
    job = slurm_jobs.start("build.slurm", arguments(settings), tmp_path / "job")
    slurm_jobs.wait_until(lambda: [*settings.out.glob(".build/checkpoints/*.pt")], job)
    os.kill(int((tmp_path / "job/task").read_text()), signal.SIGTERM)
    _, error = job.communicate(timeout=300)
    assert job.returncode == 0 and "stopped; what was done is kept" in error, error
    assert (tmp_path / "job/told").read_text() == f"requeue {slurm_jobs.ID}_1\n"
    assert not (settings.out / SUMS).exists()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "data.build"]
    ended = subprocess.run(
        [*launch, *arguments(settings)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert rows(tmp_path / "pairs") == rows(built)
    assert len(ended.stdout.splitlines()) == 1  # one of the two merges and says so
    assert json.loads(ended.stdout)["failures"] == 0
    assert leftovers(tmp_path / "pairs") == []
