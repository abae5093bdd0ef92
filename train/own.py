"""From a world's checkpoint to a calibrated mapper, in one command.

    python -m train.own --world mine.toml --out runs/mine --plan      # what it will cost, no more
    python -m train.own --world mine.toml --out runs/mine
    accelerate launch --multi_gpu --num_processes 8 -m train.own --world mine.toml --out runs/mine

Builds pairs (data.build), trains on them (train.mapper), learns the trade-off between essence and
identity (train.mapper --only-tradeoff) where the world's recipe weighs identity, calibrates
(eval.calibrate), compares (eval.compare), and writes report.md and a folder for the Hub with a
card. A few steps are timed first, and the plan is printed before anything else is done. The same
command goes on after an interruption, and finished stages are not done again.
"""

import importlib.util
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import STOPPED, Precision, Stop, say, start
from targetclip.world import load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for all results; give the same again to go on."""
    world: str
    """Path of your world's .toml file, or the name of a bundled world."""
    targets: tuple[str, ...] = ()
    """Target pictures to learn from, as data.build takes them: folders, dataset:NAME, generated:N
    and so on. Samples of the generator are learned from as well. Default: samples alone; for the
    bundled world avatars."""
    pairs: int | None = None
    """Pairs to build; 0 builds none. Default: 1,000 on an accelerator, 200 on a processor."""
    steps: int | None = None
    """Steps of training after those on pairs. Default: 4,000 on an accelerator, 1,000 on a
    processor."""
    tradeoff_steps: int | None = None
    """Steps of learning the trade-off between essence and identity, for --keep-identity; 0 learns
    none. Default: half of --steps, where the world's recipe weighs identity."""
    max_images: int | None = None
    """Images rendered at once. Default: as many as memory holds."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits."""
    precision: Precision | None = None
    """Of searches and training. Default: accelerate's, or else bf16 where it is fast."""
    licence: str | None = None
    """Terms of use, for the mapper's file."""
    seed: int = 0
    plan: bool = False
    """Time a few steps, print what each stage will cost on this device, and stop."""
    build_flags: str = ""
    """Further flags of data.build, which go before those that are chosen here, as one text after an
    equals sign: --build-flags="--steps 40"."""
    train_flags: str = ""
    """Further flags of train.mapper."""
    tradeoff_flags: str = ""
    """Further flags of train.mapper where it learns the trade-off, which has the batches, targets
    and sources of the training before it."""
    calibrate_flags: str = ""
    """Further flags of eval.calibrate."""
    compare_flags: str = ""
    """Further flags of eval.compare."""


if __name__ == "__main__":
    start("train.own", Config)

PLAN, PROGRESS, REPORT = "plan.json", "progress.json", "report.md"
HUB = "hub"  # folder that can be uploaded as it is
MAPPER = "calibrated/mapper.safetensors"
GRACE = 30.0  # seconds that processes have to end after another one failed


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that makes a part of the results."""

    name: str
    words: list[str]
    """Module and flags."""
    result: str
    """File in --out that is there when it is done."""
    what: str
    seconds: float
    """As estimated."""
    parallel: bool = False
    """All processes of a launch do it together."""


def words_of(module: str, further: str, **flags: Any) -> list[str]:
    """Return module and flags of a command; flags that are None, False or () are left out."""
    words = [module]
    for name, value in flags.items():
        if value is not None and value is not False and value != ():
            flag = f"--{name.replace('_', '-')}"
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            # What begins with a dash would else be taken for a flag.
            joined = [f"{flag}={value}"] if str(value).startswith("-") else []
            words += joined or [flag, *map(str, values)]
    return [*words, *shlex.split(further)]


def duration(seconds: float) -> str:
    """Return seconds in the unit that fits."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds > 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def read(path: Path) -> dict[str, Any]:
    """Return the content of a file of JSON; nothing where there is none. ValueError: it is
    damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}): delete it, it is made anew"
        ) from error
    return content


def is_done(out: Path, stage: Stage, progress: Mapping[str, Any]) -> bool:
    """Tell whether a stage is finished, and what it made still there."""
    return bool(progress.get(stage.name, {}).get("done")) and (out / stage.result).is_file()


# Running a stage


Call = Callable[[Sequence[str], int, Stop], int]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched() -> tuple[int, int]:
    """Return the number of this process in its launch, and the number of all.
    ValueError: they are on several machines."""
    rank, count = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if here != count:
        raise ValueError(
            f"expected all processes on one machine, found {here} of {count}: run the commands of "
            "the stages one by one (docs/cluster.md)"
        )
    return rank, count


def together(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return what tells a process who it works with, as a launcher would; nothing for one alone."""
    if processes == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
    numbers |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), processes)
    # Not the store of the launcher: in every stage they meet anew.
    meet = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return meet | {name: str(number) for name, number in numbers.items()}


def call(words: Sequence[str], processes: int, stop: Stop) -> int:
    """Run a command in so many processes that work together; return its exit code.

    They are no part of the terminal's group, so a Ctrl-C comes to them once, from here.
    """
    port, told, running = free_port(), math.inf, list[subprocess.Popen[bytes]]()
    try:
        for rank in range(processes):
            environment = {**os.environ, **together(rank, processes, port)}
            line = [sys.executable, "-m", *words]
            running.append(subprocess.Popen(line, env=environment, start_new_session=True))
        while None in (codes := [process.poll() for process in running]):
            if told == math.inf and (stop.signal is not None or any(codes)):
                told = time.monotonic()
                for process in running:
                    process.send_signal(signal.SIGINT)
            if any(codes) and time.monotonic() - told > GRACE:
                break  # the others wait for one that failed
            time.sleep(0.1)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
    bad = [code for code in codes if code]
    return next((code for code in bad if code != STOPPED), bad[0] if bad else 0)


def ended(name: str, code: int, stop: Stop) -> int:
    """Return the exit code of a stage whose own line said why.
    Stopped: a signal ended it before it could say so. ChildProcessError: it was killed."""
    if code not in (0, STOPPED):
        stop.check()
    if code < 0:
        raise ChildProcessError(
            f"{name}: expected it to end by itself, found it killed by signal {-code}, as where "
            "memory runs out: give a smaller --max-images; the same command goes on"
        )
    return code


def run_stage(
    out: Path, stage: Stage, progress: dict[str, Any], call: Call, processes: int, stop: Stop
) -> int:
    """Run a stage, add its seconds to what is known of it, and return its exit code."""
    words = stage.words
    validation = [*(out / "pairs/data").glob("validation-*")]
    if stage.name == "compare" and "--pairs" in words and not validation:
        say("no pair is of the validation split: compared without baselines", error=True)
        at = words.index("--pairs")
        words = [*words[:at], *words[at + 2 :]]
    say(f"{stage.name}, about {duration(stage.seconds)}: {shlex.join(words)}", error=True)
    row = progress.setdefault(stage.name, {"seconds": 0.0})
    row |= {"words": stage.words, "done": False}
    command.write_json(out / PROGRESS, progress)
    begin = time.monotonic()
    code = ended(stage.name, call(words, processes if stage.parallel else 1, stop), stop)
    row |= {"seconds": row["seconds"] + time.monotonic() - begin, "done": code == 0}
    command.write_json(out / PROGRESS, progress)
    return code


# The report


def score_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a table of transfer scores with their intervals, of each method on each set, and a
    warning where a baseline is better than the mapper."""
    sets = report["sets"]
    names = dict.fromkeys(name for scored in sets.values() for name in scored["all"])
    lines = [f"| transfer score | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for name in names:
        cells = []
        for scored in sets.values():
            score = scored["all"].get(name, {}).get("transfer", {"mean": math.nan, "low": None})
            bounds = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
            cells.append(f"{score['mean']:.3f}{bounds}".replace("nan", ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, scored in sets.items():
        if name == "adversarial":  # there is no essence to bring
            continue
        means = {method: row["transfer"]["mean"] for method, row in scored["all"].items()}
        best = max(means, key=lambda method: means[method])
        if best in ("mean-direction", "nearest-neighbour", "ridge"):
            lines += ["", f"**On the set {name} `{best}` beats the mapper: train longer.**"]
    return [*lines, ""]


def report_text(config: Config, plan: Mapping[str, Any], progress: Mapping[str, Any]) -> str:
    """Return report.md: what came out, scores, pictures, and seconds against their estimates."""
    flags = {**vars(config), "world": Path(config.world).name}
    defaults = vars(Config(out=config.out, world=""))
    del defaults["out"]
    made = {
        MAPPER: "the mapper: name it in the world's file as `mapper`, or give it as --mapper",
        f"{HUB}/README.md": "its card, in a folder to upload to the Hub",
        "pairs/README.md": "card of the pairs",
        "mapper/log.jsonl": "losses and scores of the training",
        "tradeoff/log.jsonl": "those of learning the trade-off, with both of its ends",
        "calibrated/report.json": "what the calibration measured",
        "compare/report.md": "all scores of the comparison, and how to read them",
    }
    lines = [f"# A mapper for the world {plan['world']}", "", "```bash"]
    lines += [command.command_line("train.own", flags, defaults), "```", ""]
    lines += ["| file | what it is |", "|---|---|"]
    lines += [f"| [{n}]({n}) | {what} |" for n, what in made.items() if (config.out / n).is_file()]
    lines += ["", "## Scores on unseen targets", ""]
    lines += ["Brackets hold 95 % of bootstrap means over targets. See the pictures as well.", ""]
    lines += score_lines(read(config.out / "compare/report.json"))
    lines += ["## Pictures", "", "Sources, then targets and the sources with their essence.", ""]
    grids = sorted((config.out / "compare/grids").glob("*mapper.png"))
    for path in [config.out / "mapper/grid.png", *grids, config.out / "calibrated/reliability.png"]:
        name = path.relative_to(config.out).as_posix()
        lines += [f"![{name}]({name.replace(' ', '%20')})", ""]
    lines += [f"## Seconds on {plan['device']}", ""]
    lines += ["| stage | estimated | taken | command |", "|---|---|---|---|"]
    for stage in plan["stages"]:
        taken, words = progress[stage["name"]]["seconds"], shlex.join(stage["words"])
        lines.append(f"| {stage['name']} | {stage['seconds']:.0f} | {taken:.0f} | `{words}` |")
    return "\n".join(lines) + "\n"


# The command


def check_config(config: Config) -> None:
    """Raise a ValueError for options that cannot be, before anything is loaded."""
    command.check_least(config, pairs=0, steps=1, tradeoff_steps=0, max_images=1)
    command.choose_precision(config.precision)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('charts need matplotlib, which is not installed: pip install -e ".[eval]"')


def run(config: Config, call: Call = call) -> int:
    """Do the stages that are left; return the exit code, which is that of a stage that failed.

    Args:
        call: runs a command in so many processes; returns its exit code.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        Stopped: a signal came between two stages.
    """
    check_config(config)
    rank, processes = launched()
    if rank:  # the first process starts as many for each stage
        return 0
    world, out = load_world(config.world), config.out
    command.make_folder(out)
    if config.plan:
        # Not imported above: it takes torch, which --help and an error need not wait for.
        import_module("train.own_plan").make_plan(config, world, processes)
        return 0
    stop = Stop()
    stop.listen()
    with command.locked_folder(out):
        # In a process of its own, whose memory is free again before the first stage begins.
        words = words_of("train.own", "", **{**vars(config), "plan": True})
        if code := ended("plan", call(words, 1, stop), stop):
            return code
        plan, progress = read(out / PLAN), read(out / PROGRESS)
        for stage in (Stage(**row) for row in plan["stages"]):
            stop.check()
            if not is_done(out, stage, progress):
                code = run_stage(out, stage, progress, call, processes, stop)
                if code:
                    return code
        stop.check()
        from predictor.mapper import load_mapper

        load_mapper(out / MAPPER)[0].save_pretrained(out / HUB)
        command.write_file(out / REPORT, report_text(config, plan, progress))
    then = f"targetclip transfer --mapper {out / MAPPER} --world {config.world} --num-sources 6"
    command.say_next(out, f"{REPORT}, {MAPPER}, {HUB}/", f"{then} --out OUT --target PICTURE")
    return 0
