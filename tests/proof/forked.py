"""Run the command `data.build` in forked children, to be killed and halted, in a tiny world.

A child of a process that has imported everything starts in a third of a second. Knows the command,
processes and the folder of a build; nothing of which fault comes when.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import open_clip  # here and not in every child, where it takes seconds
import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data import build, dataset, plan
from data.publish import At, go_on
from targetclip import command
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from tests.proof.points import Action, fault_at

Stage = Literal["plan", "run", "merge"]

DISK = 4096  # bytes that a file may have where the disk is full
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
WORLD = """name = "tiny"
generator = "generator.safetensors"
embedder = "clip"
recipe = "consistent"
strength = 1.0
truncation = 1.0
"""


def write_world(folder: Path) -> None:
    """Write a world with a 16 px generator and a 32-dim CLIP of random weights."""
    (folder / "clip").mkdir(parents=True)
    config = {"model_cfg": CLIP, "preprocess_cfg": {}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(**CLIP)
    with torch.no_grad():
        # Fresh weights give any two pictures a cosine of 0.99; enlarged ones tell them apart.
        for parameter in clip.visual.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    save_file(clip.state_dict(), folder / "clip/open_clip_model.safetensors")
    generator = StyleGAN2(
        StyleGAN2Config(resolution=16, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8, 8))
    )
    save_safetensors(generator, folder / "generator.safetensors")
    (folder / "world.toml").write_text(WORLD)


def make_world(folder: Path) -> None:
    """Make a world to build with, `world.toml` in a new folder."""
    # In a child: a process whose torch has started threads must not be forked.
    process = get_context("fork").Process(target=write_world, args=(folder,))
    process.start()
    process.join()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let no file grow beyond DISK; messages are written afterwards."""
    messages, before = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, before[1]))
    try:
        with contextlib.redirect_stderr(messages):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.stderr.write(messages.getvalue())


def child(arguments: list[str], log: Path, at: At, starved: bool, shard_bytes: int) -> None:
    """Run `python -m data.build` with these arguments and with a fault."""

    def run(config: build.Config) -> int:
        return build.run(config, at)

    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # elsewhere the same work may end in other bits
    tqdm.set_lock(RLock())  # one of its own: another's holder may be killed
    torch.set_num_threads(1)
    plan.SAVE_SECONDS = 0.0  # else so small a plan would be saved only once
    dataset.SHARD_BYTES = shard_bytes
    sys.argv = ["data.build", *arguments]
    with full_disk() if starved else contextlib.nullcontext():
        command.main(run, build.Config, None, "python -m data.build")


@dataclass(frozen=True)
class Fault:
    """An end or a halt of a worker: at the `count`-th call of a place, or else after a time."""

    place: str
    """A point of the code, or `time`."""
    count: int
    seconds: float
    action: Action = "kill"

    @property
    def at(self) -> At:
        """For `data.build.run`."""
        return go_on if self.place == "time" else fault_at(self.place, self.count, self.action)


@dataclass(kw_only=True)
class Child:
    """A worker in a process of its own."""

    process: ForkProcess
    log: Path
    fault: Fault | None
    began: float = field(default_factory=time.monotonic)
    late: bool = False
    """Its fault came by time."""
    lasted: float = 0.0
    """Seconds that it lived before its fault."""

    def strike(self) -> bool:
        """Kill or stop it if the time for that has come; return False if it has ended."""
        alive = self.process.is_alive()
        if alive and not self.late:
            self.lasted = time.monotonic() - self.began
        if alive and not self.late and self.fault and self.lasted > self.fault.seconds:
            self.late = True
            kills = self.fault.action == "kill"
            self.signal(signal.SIGKILL if kills else signal.SIGSTOP)
        return alive

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        # Until it is waited for, which is_alive does, its number is nobody else's.
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def met(self) -> dict[str, Any]:
        """Return where and when its fault came, and the name of its log."""
        record: dict[str, Any] = {"log": self.log.name}
        if self.fault:
            place = "time" if self.late else self.fault.place
            record |= {"place": place, "count": self.fault.count, "seconds": round(self.lasted, 3)}
        return record

    def halted(self) -> bool:
        """Wait until it is halted; return False if it ended before."""
        while self.strike():
            if psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED:
                return True
            time.sleep(0.005)
        return False


def start(
    arguments: list[str],
    log: Path,
    fault: Fault | None = None,
    starved: bool = False,
    shard_bytes: int = dataset.SHARD_BYTES,
) -> Child:
    """Start a worker, in a session of its own.

    Args:
        log: file for its output.
        starved: its disk is full.
        shard_bytes: of the dataset it merges.
    """
    at = fault.at if fault else go_on
    arguments_of_child = (arguments, log, at, starved, shard_bytes)
    process = get_context("fork").Process(target=child, args=arguments_of_child)
    process.start()
    return Child(process=process, log=log, fault=fault)


@dataclass(frozen=True)
class BuildFolder:
    """A build's folder, read from outside."""

    out: Path
    chunks: int

    @property
    def work(self) -> Path:
        """Folder of the plan, the chunks and the claims."""
        return self.out / build.WORK

    def published(self) -> list[Path]:
        """Return the chunks that are done."""
        return sorted((self.work / "chunks").glob("[0-9]*.parquet"))

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of chunks that are not done."""
        done = {path.stem for path in self.published()}
        paths = sorted((self.work / "checkpoints").glob("[0-9]*.pt"))
        return [path for path in paths if path.name.partition(".")[0] not in done]

    def stage(self) -> Stage:
        """Return the stage that the build is in."""
        if not (self.work / "plan/plan.json").is_file():
            return "plan"
        return "run" if len(self.published()) < self.chunks else "merge"

    def claimed(self, pid: int | None) -> list[str]:
        """Return the names that a process has claimed."""
        names = []
        for path in (self.work / "claims").glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                names += [path.name] if json.loads(path.read_text())["pid"] == pid else []
        return names
