"""The command `data.build` in forked children, to be killed and halted; and a tiny world for it.

A child of a process that has imported everything starts in a third of a second. Knows the command,
processes, and what a look at a build's folder tells; nothing of which fault comes when.
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

import open_clip  # here and not when a worker needs it, for that takes it seconds
import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data import build, dataset, plan
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config

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
    """A 16 px generator and a 32-dim CLIP with random weights, for quick chunks."""
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
    """A world to build with, `world.toml` in a new folder."""
    # In a child, for a process whose torch has started threads is not to be forked.
    process = get_context("fork").Process(target=write_world, args=(folder,))
    process.start()
    process.join()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond DISK; what is said meanwhile is written afterwards."""
    said, before = io.StringIO(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (DISK, before[1]))
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.stderr.write(said.getvalue())


def child(arguments: list[str], log: Path, fault: str, starved: bool, shard_bytes: int) -> None:
    """`python -m data.build` with these arguments; TARGETCLIP_FAULT is `fault`."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["TARGETCLIP_FAULT"] = fault
    os.environ["ACCELERATE_USE_CPU"] = "true"  # elsewhere the same work may end in other bits
    tqdm.set_lock(RLock())  # one of its own: another's holder may be killed
    torch.set_num_threads(1)
    plan.SAVE_SECONDS = 0.0  # or so small a plan would be saved but once
    dataset.SHARD_BYTES = shard_bytes
    sys.argv = ["data.build", *arguments]
    with full_disk() if starved else contextlib.nullcontext():
        build.main()


@dataclass(frozen=True)
class Fault:
    """What is to happen to a worker: at the `count`-th call of a place, or else after a time."""

    place: str
    """A name of `fault_point`, or `time`."""
    count: int
    seconds: float
    action: Literal["kill", "stop"] = "kill"

    @property
    def setting(self) -> str:
        """For TARGETCLIP_FAULT."""
        return "" if self.place == "time" else f"{self.place}:{self.count}:{self.action}"


@dataclass
class Worker:
    """A worker that was started."""

    process: ForkProcess
    log: Path
    fault: Fault | None
    began: float = field(default_factory=time.monotonic)
    late: bool = False
    """Its fault came by time."""
    lasted: float = 0.0
    """Seconds it was seen alive before its fault."""

    def strike(self) -> bool:
        """Kill or stop it if the time for that has come; False if it has ended."""
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
        """Where and when its fault came, and where to read what it said."""
        found: dict[str, Any] = {"log": self.log.name}
        if self.fault:
            place = "time" if self.late else self.fault.place
            found |= {"place": place, "count": self.fault.count, "seconds": round(self.lasted, 3)}
        return found

    def halted(self) -> bool:
        """Wait until it is halted; False if it ended before."""
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
) -> Worker:
    """A worker on its way, in a session of its own.

    Args:
        log: file for what it says.
        starved: whether its disk is full.
        shard_bytes: of the dataset it merges.
    """
    setting = fault.setting if fault else ""
    arguments_of_child = (arguments, log, setting, starved, shard_bytes)
    process = get_context("fork").Process(target=child, args=arguments_of_child)
    process.start()
    return Worker(process, log, fault)


@dataclass(frozen=True)
class Folder:
    """A build's folder, seen from outside."""

    out: Path
    chunks: int

    @property
    def work(self) -> Path:
        """Where its workers are at work."""
        return self.out / build.WORK

    def published(self) -> list[Path]:
        """The chunks that are done."""
        return sorted((self.work / "chunks").glob("[0-9]*.parquet"))

    def checkpoints(self) -> list[Path]:
        """Those of chunks that are not done."""
        done = {path.stem for path in self.published()}
        found = sorted((self.work / "checkpoints").glob("[0-9]*.pt"))
        return [path for path in found if path.name.partition(".")[0] not in done]

    def stage(self) -> Stage:
        """What the build is at."""
        if not (self.work / "plan/plan.json").is_file():
            return "plan"
        return "run" if len(self.published()) < self.chunks else "merge"

    def claimed(self, pid: int | None) -> list[str]:
        """Names that a process has claimed."""
        names = []
        for path in (self.work / "claims").glob("[!.]*"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                names += [path.name] if json.loads(path.read_text())["pid"] == pid else []
        return names
