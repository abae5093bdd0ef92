"""Prove that a build which is killed, stalled, starved of disk and damaged comes out right.

    python -m tests.proof.faults --out runs/faults --targets 300 --kills 200

Its dataset must equal, bit by bit, that of an undisturbed build. Knows which fault comes when and
what must follow; nothing of how pairs are made. Every decision is drawn from the seed and the
number of the round, and every fault is logged; only the clock is not the same twice.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from targetclip import command
from targetclip.command import FAILED, one_line, start, write_json


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for both builds, the workers' output and the report; new or empty."""
    world: Path | None = None
    """World file to build with. Default: a tiny world of random weights, made for the purpose."""
    targets: int = 300
    """Drawn faces, each a target."""
    batch_size: int = 1
    """Targets of a chunk."""
    steps: int = 12
    """Steps of the teacher."""
    kills: int = 200
    """Workers killed without warning, half of them at a named point of the code."""
    stalls: int = 10
    """Workers halted for longer than their lease, so that others take over, and then woken."""
    spoils: int = 10
    """Checkpoints of the dead that are truncated or get a bit flipped."""
    processes: int = 3
    """Workers at once, at most."""
    lease: float = 2.0
    """Seconds without a sign of life after which a worker counts as dead."""
    checkpoint_seconds: float = 0.1
    """Of work between two checkpoints."""
    seed: int = 0
    """Of all faults."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {"targets": 8, "batch_size": 1, "steps": 1, "kills": 1}
        least |= {"stalls": 0, "spoils": 0, "processes": 1, "lease": 0.1, "checkpoint_seconds": 0}
        for name, value in least.items():
            if not getattr(self, name) >= value:
                flag, given = name.replace("_", "-"), getattr(self, name)
                raise ValueError(f"--{flag}: expected {value} or more, found {given}")
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"--out: expected a new or empty folder, found {str(self.out)!r}")

    @property
    def chunks(self) -> int:
        """Number of chunks; no two drawn faces are one target."""
        return -(-self.targets // self.batch_size)

    def arguments(self, out: Path) -> list[str]:
        """Return the arguments of the command that builds into a folder."""
        world = self.world or self.out / "world/world.toml"
        rest = (
            f"--targets avataaars:{self.targets} --steps {self.steps} "
            f"--batch-size {self.batch_size} --lease {self.lease} "
            f"--checkpoint-seconds {self.checkpoint_seconds} "
            "--initial zero --held-out 4 --max-attempts 1000000"
        )
        return ["--out", str(out), "--world", str(world), *rest.split()]


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("tests.proof.faults", Config)

from tqdm import tqdm

from data.claims import create, remove_only
from data.plan import PICTURES, load_plan
from data.worker import chunk_name
from tests.proof.damage import KINDS, check_damages, flip_bit, rows_of, truncate, unequal_rows
from tests.proof.forked import DISK, BuildFolder, Child, Fault, Stage, make_world
from tests.proof.forked import start as start_child

STAGES: tuple[Stage, ...] = ("plan", "run", "merge")
PATIENCE = 600.0  # seconds after which a worker that should end counts as hanging
OWNER = "faults"  # of the claims made here
PROG = "python -m tests.proof.faults"
ROUNDS = 10  # for every kill and stall, before they count as impossible


class DisturbedBuild:
    """A build that is disturbed, and its record."""

    def __init__(self, config: Config, bar: Any) -> None:
        self.config = config
        self.bar = bar
        self.build = BuildFolder(config.out / "pairs", config.chunks)
        self.began = time.monotonic()
        self.rounds = self.started = 0
        self.living: list[Child] = []
        self.usual: dict[Stage, float] = {}
        self.published: dict[str, int] = {}
        self.faults: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def start(self, *more: str, out: Path | None = None, **changes: Any) -> Child:
        """Start a worker; see `tests.proof.forked.start`."""
        log = self.config.out / f"logs/{self.started:04d}.txt"
        arguments = [*self.config.arguments(out or self.build.out), *more]
        self.living.append(start_child(arguments, log, **changes))
        self.started += 1
        return self.living[-1]

    def ended(self, worker: Child, *codes: int) -> str:
        """Wait for the end of a worker, with one of these codes; return its output."""
        worker.process.join(PATIENCE)
        if worker.process.exitcode is None:
            self.wrong.append(f"{worker.log.name}: hangs")
            worker.process.kill()
            worker.process.join()
        self.living.remove(worker)
        said = worker.log.read_text() if worker.log.exists() else ""
        if worker.process.exitcode not in codes or "Traceback" in said:
            last = (said.replace("\r", "\n").splitlines() or [""])[-1]
            self.wrong.append(f"{worker.log.name}: ended with {worker.process.exitcode}: {last}")
        return said

    def refused(self, worker: Child, reason: str) -> None:
        """A worker must end with exit code 1 and one line that gives this reason."""
        output = self.ended(worker, 1)
        if reason not in output or output.count("error: ") != 1:
            self.wrong.append(f"{worker.log.name}: expected one error with {reason!r} in it")

    def count(self, kind: str) -> int:
        """Return the number of faults of a kind so far."""
        return sum(fault["kind"] == kind for fault in self.faults)

    def note(self, kind: str, stage: Stage, worker: Child | None = None, **more: Any) -> None:
        """Log a fault that has come."""
        entry = {"round": self.rounds, "stage": stage, "kind": kind, **more}
        entry |= worker.met() if worker else {}
        self.faults.append(entry | {"at": round(time.monotonic() - self.began, 3)})
        with (self.config.out / "faults.jsonl").open("a") as file:
            file.write(json.dumps(self.faults[-1]) + "\n")
        self.bar.update(kind == "kill")
        self.bar.set_postfix(stage=stage, chunks=len(self.build.published()))

    def watch(self) -> None:
        """Check that published chunks stay as they are."""
        now = {path.name: path.stat().st_ino for path in self.build.published()}
        for name, inode in self.published.items():
            if now.get(name) != inode:
                self.wrong.append(f"round {self.rounds}: published chunk {name} was replaced")
        self.published = now

    def kills_left(self, stage: Stage) -> int:
        """Return the kills left for a stage: a twentieth for planning, a tenth for merging."""
        kills, killed = self.config.kills, self.count("kill")
        if stage == "plan":
            return max(1, kills // 20) - killed
        return kills - killed - (max(1, kills // 10) if stage == "run" else 0)

    def draw(self, stage: Stage, rng: random.Random, action: Any = "kill") -> Fault:
        """Draw a fault for a stage: half of them by place and half by time."""
        left = self.config.chunks - len(self.build.published())
        chunks = max(1.0, 1.5 * left / max(1, self.kills_left("run")))
        usual = self.usual[stage] * (chunks / self.config.chunks if stage == "run" else 1.0)
        seconds = 0.3 + 1.5 * usual
        if rng.random() < 0.5:
            return Fault("time", 0, rng.uniform(0, seconds), action)
        saves = -(-self.config.targets // PICTURES) + 1
        calls: dict[str, float] = {"after-claim": 1, "before-release": 1, "before-removal": 1}
        if stage == "plan":
            calls |= {"before-write": saves + 1, "after-write": saves + 1, "after-draft": saves}
        elif stage == "merge":
            calls |= {"before-write": 5, "after-write": 5, "before-sums": 1}
        else:
            calls |= {"in-chunk": self.config.steps, "before-write": 3, "after-write": 3}
            calls |= {"after-checkpoint": 1, "after-link": 1}
            calls = {place: count * chunks for place, count in calls.items()}
        place = rng.choice(sorted(calls))
        limit = 3 * seconds + self.config.lease
        return Fault(place, rng.randint(1, int(calls[place])), limit, action)

    def settle(self) -> None:
        """Wait until the dead hold neither plan nor merge, or faults would hit those who wait."""
        if any((self.build.work / "claims").glob("[a-z]*")):  # those of chunks are numbers
            time.sleep(1.1 * self.config.lease)

    def kill_some(self, stage: Stage, rng: random.Random) -> None:
        """Start some workers at once and kill them all, but those that end before."""
        self.settle()
        count = min(rng.randint(1, self.config.processes), self.kills_left(stage))
        workers = [self.start(fault=self.draw(stage, rng)) for _ in range(count)]
        living = workers
        while living:
            living = [worker for worker in living if worker.strike()]
            time.sleep(0.005)
        for worker in workers:
            self.ended(worker, 0, -signal.SIGKILL)
            if worker.process.exitcode == -signal.SIGKILL:
                held = self.build.claimed(worker.process.pid)
                begun = {path.name.partition(".")[0] for path in self.build.checkpoints()}
                met = ["left a checkpoint" for name in held if name in begun]
                self.note("kill", stage, worker, held=held, met=met)

    def stall_one(self, stage: Stage, rng: random.Random) -> None:
        """Halt a worker, have another do its work, and wake it; it must lose or do no harm."""
        self.settle()
        zombie = self.start(fault=self.draw(stage, rng, "stop"))
        if not zombie.halted():
            self.ended(zombie, 0)
            return
        held = self.build.claimed(zombie.process.pid)
        time.sleep(1.2 * self.config.lease)
        # With all other chunks in living hands, the next worker takes what the halted one holds.
        folder = self.build.work / "claims"
        others = [folder / chunk_name(i) for i in range(self.config.chunks) if stage == "run"]
        for path in others:
            if path.name not in held and not create(path, OWNER):
                os.utime(path)
        thief = self.start("--only", stage)
        beside = rng.random() < 0.5
        time.sleep(rng.uniform(0.2, 0.6)) if beside else thief.process.join(PATIENCE)
        zombie.signal(signal.SIGCONT)
        output = self.ended(thief, 0)
        time.sleep(rng.uniform(0, 1))
        zombie.signal(signal.SIGTERM)
        output += self.ended(zombie, 0, 130, -signal.SIGTERM)
        for path in others:
            remove_only(path, lambda claim: claim.owner == OWNER)
        signs = {"taken over": "lost its claim", "another worker was first": "one came second"}
        met = [name for text, name in signs.items() if text in output]
        self.note("stall", stage, zombie, held=held, beside=beside, met=met)

    def spoil_one(self, stage: Stage, rng: random.Random) -> None:
        """Damage a checkpoint that the dead have left, if there is one."""
        spoiled = {fault.get("file") for fault in self.faults}
        left = [path for path in self.build.checkpoints() if path.name not in spoiled]
        if left:
            path, damage = rng.choice(left), (truncate, flip_bit)[self.count("spoil") % 2]
            damage(path, rng)
            self.note("spoil", stage, place=damage.__name__, file=path.name)

    def first_visit(self, stage: Stage) -> None:
        """Try once in a stage: a full disk, and other settings."""
        if stage != "plan" or 128 * self.config.targets > DISK:  # bytes of their embeddings
            worker = self.start("--only", stage, starved=True)
            self.refused(worker, "expected room for")
            self.note("full disk", stage, worker, place="start")
        if stage == "run":
            worker = self.start("--steps", str(self.config.steps + 1))
            self.refused(worker, "was planned with other settings")
            self.note("other settings", stage, worker, place="start")

    def stall_due(self, stage: Stage) -> bool:
        """Tell whether a stall is due: evenly over the chunks; one while planning, one merging."""
        stalls, stalled = self.config.stalls, self.count("stall")
        if stage == "plan":
            return stalls > 2 and not stalled
        if stage == "run":
            done = len(self.build.published()) / self.config.chunks
            return stalled < int((stalls - (stalls > 2)) * done + 0.5)
        return stalled < stalls

    def disturb(self) -> None:
        """Disturb the build in rounds, until all faults have come and every chunk is done."""
        config, visited = self.config, set[Stage]()
        for self.rounds in range(1, ROUNDS * (config.kills + config.stalls) + 4):
            stage = self.build.stage()
            rng = random.Random(f"{config.seed} {self.rounds}")
            if stage not in visited:
                visited.add(stage)
                self.first_visit(stage)
            elif self.stall_due(stage):
                self.stall_one(stage, rng)
            elif self.kills_left(stage) > 0:
                self.kill_some(stage, rng)
                if self.count("spoil") < config.spoils * self.count("kill") / config.kills:
                    self.spoil_one(stage, rng)
            elif stage == "merge":
                return
            else:
                time.sleep(config.lease)  # claims of the dead are free then
                self.ended(self.start("--only", stage), 0)
            self.watch()
        self.wrong.append(f"after {self.rounds} rounds not all faults have come")

    def undisturbed(self, out: Path) -> None:
        """Make the build to compare with, and measure its stages."""
        for stage in STAGES:
            began = time.monotonic()
            self.ended(self.start("--only", stage, out=out), 0)
            self.usual[stage] = time.monotonic() - began

    def finish(self) -> None:
        """Damage a chunk, which must be named; delete it, and let the command run undisturbed."""
        rng = random.Random(self.config.seed)
        chunk = rng.choice(self.build.published())
        flip_bit(chunk, rng)
        self.refused(self.start("--only", "merge"), f"{chunk.name}' is truncated or altered")
        self.note("damaged chunk", "merge", place="flip_bit", file=chunk.name)
        chunk.unlink()
        self.ended(self.start(), 0)
        if "clean" not in self.ended(self.start("--only", "verify"), 0):
            self.wrong.append("the dataset is not clean")


def judge(trial: DisturbedBuild, reference: Path) -> dict[str, Any]:
    """Compare both datasets, and damage copies of the disturbed one; adds to `trial.wrong`."""
    config, out = trial.config, trial.build.out
    rows, expected = rows_of(out), rows_of(reference)
    trial.wrong += unequal_rows(rows, expected)
    if len(expected) != config.targets:
        trial.wrong.append(f"expected {config.targets} pairs, found {len(expected)}")
    named: Counter[str] = Counter()
    if not trial.wrong:
        # Many small shards, since the damages need two.
        many, small = config.out / "sharded", 150 * config.targets
        shutil.copytree(out, many)
        trial.ended(trial.start("--only", "merge", out=many, shard_bytes=small), 0)
        splits = load_plan(trial.build.work / "plan").splits()
        rng = random.Random(config.seed)
        named, wrong = check_damages(many, config.out / "damaged", splits, rng)
        trial.wrong += wrong
    return {
        "pairs": len(rows),
        "pairs_equal": sum(
            not unequal_rows([a], [b]) for a, b in zip(rows, expected, strict=False)
        ),
        "damages": dict(Counter(KINDS)),
        "damages_named": dict(named),
    }


def report_of(trial: DisturbedBuild, judged: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of faults and of what followed."""
    names = sorted(f"{f['kind']}, {f['stage']}, {f['place']}" for f in trial.faults)
    return {
        "wrong": trial.wrong,
        "kills": trial.count("kill"),
        "stalls": trial.count("stall"),
        "rounds": trial.rounds,
        "workers": trial.started,
        "seconds": round(time.monotonic() - trial.began, 1),
        "chunks": len(trial.build.published()),
        **judged,
        "faults": Counter(names),
        "of_these": Counter(name for fault in trial.faults for name in fault.get("met", ())),
        "unfinished_files_left": len(list(trial.build.out.rglob(".*.tmp"))),
        "settings": {name: str(value) for name, value in asdict(trial.config).items()},
        "versions": command.versions(),
    }


def prove(config: Config) -> dict[str, Any]:
    """Build undisturbed and disturbed, compare and damage; return the report of report.json."""
    (config.out / "logs").mkdir(parents=True, exist_ok=True)
    # No lock that a killed child may hold, and no thread that a fork may cut off.
    tqdm.set_lock(RLock())
    tqdm.monitor_interval = 0
    with tqdm(desc="faults", total=config.kills, unit="kill") as bar:
        trial = DisturbedBuild(config, bar)
        if config.world is None:
            make_world(config.out / "world")
        try:
            trial.undisturbed(config.out / "reference")
            if not trial.wrong:
                trial.disturb()
            if trial.build.published():
                trial.finish()
            report = report_of(trial, judge(trial, config.out / "reference"))
        finally:
            for worker in trial.living:
                worker.signal(signal.SIGKILL)
    write_json(config.out / "report.json", report)
    return report


def outcome(report: dict[str, Any]) -> int:
    """Print the outcome; return exit code 1 and print the reason if anything is wrong."""
    print(
        f"{report['kills']} kills, {report['stalls']} stalls in {report['rounds']} rounds and "
        f"{report['seconds']} s: {report['pairs_equal']} of {report['pairs']} pairs equal, "
        f"{sum(report['damages_named'].values())} of {len(KINDS)} damages named"
    )
    if not report["wrong"]:
        return 0
    first = one_line(report["wrong"][0])
    print(
        f"{PROG}: error: {len(report['wrong'])} not as expected, the first: {first}",
        file=sys.stderr,
    )
    return FAILED


def run(config: Config) -> int:
    """Prove, and return the exit code."""
    return outcome(prove(config))
