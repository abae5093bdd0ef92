"""The course of the mapper's training: steps, gradients of many processes, checkpoints, log.

Knows that a loss is drawn from a seed; nothing of what is minimised or learned from. Every step
draws its batches from its own number and the process's, so a killed run goes on exactly where it
was.
"""

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data.build import in_precision
from data.worker import Stop, Stopped
from predictor.mapper import Mapper
from targetclip.recipes import with_defaults
from targetclip.seeds import seed_of
from train.loop import CHECKPOINT, save_checkpoint, update_average, write_atomically
from train.mapper_objective import Stage, stage_at

WARM_UP = 100  # steps, or a tenth of them all
NO_CHECKPOINT = "there is no checkpoint yet"


@dataclass(frozen=True)
class Course:
    """How a training goes on, but for what it minimises."""

    out: Path
    """Folder of the checkpoint."""
    stages: tuple[Stage, ...]
    learning_rate: float
    """At its highest."""
    clip: float
    """Longest gradient; a longer one is cut to it."""
    ema: float
    accumulate: int
    """Batches a step and process."""
    seed: int
    evaluate_every: int
    checkpoint_seconds: float

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def rate_factor(step: int, steps: int) -> float:
    """Learning rate at a step, as a part of the highest: warm-up, then a cosine to nothing."""
    warm_up = max(1, min(WARM_UP, steps // 10))
    return min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def trim_log(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run takes again, and a line cut short."""
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_atomically(path, lambda unfinished: unfinished.write_text("".join(kept)))


@dataclass
class Training:
    """A training at some step, and all it needs to take the next ones."""

    course: Course
    accelerator: Accelerator
    objective: Any
    """Objective, perhaps in a parallel wrapper."""
    mapper: Mapper
    average: Mapper
    optimizer: Any
    settings: dict[str, Any]
    """What a checkpoint must agree in."""
    stop: Stop
    step: int = 0
    running: dict[str, float] = field(default_factory=dict)
    """Smoothed losses."""
    stopping: bool = False

    @property
    def checkpoint(self) -> Path:
        return self.course.out / CHECKPOINT

    def save(self) -> None:
        """Write the checkpoint, in the main process."""
        if self.accelerator.is_main_process:
            more = {"settings": self.settings, "running": self.running}
            parts = (self.mapper, self.average, self.optimizer)
            save_checkpoint(self.checkpoint, self.step, *parts, extra=more)

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ValueError: it is damaged, or of other settings.
        """
        if not self.checkpoint.exists():
            return
        content = io.BytesIO(self.checkpoint.read_bytes())
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
            found = state["settings"]
            found["recipe"] = with_defaults(found["recipe"])
        except Exception as error:  # a damaged file raises nearly anything
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{str(self.checkpoint)!r} is not a checkpoint of this trainer, or damaged: "
                f"{reason}; delete it to start anew"
            ) from error
        names = dict.fromkeys([*self.settings, *found])
        other = [name for name in names if found.get(name) != self.settings.get(name)]
        if other:
            told = ", ".join(f"{n} {found.get(n)} not {self.settings.get(n)}" for n in other)
            raise ValueError(
                f"{str(self.checkpoint)!r} is of other settings: {told}; give the same as before, "
                "or another --out"
            )
        try:
            self.mapper.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{str(self.checkpoint)!r} is of another version of the mapper: {reason}; finish "
                "it by that version, or give another --out"
            ) from error
        self.step, self.running = state["step"], dict(state["running"])

    def take_step(self) -> None:
        """One step of the optimizer, on `accumulate` batches of every process.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, in any process; weights and
                checkpoint stay as they were before.
        """
        accelerator, course = self.accelerator, self.course
        terms = stage_at(self.course.stages, self.step).terms
        for group in self.optimizer.param_groups:
            group["lr"] = course.learning_rate * rate_factor(self.step, self.course.steps)
        losses: dict[str, torch.Tensor] = {}
        for micro in range(course.accumulate):
            # Numbered through all processes: two of them draw what one would in two batches.
            shard = micro * accelerator.num_processes + accelerator.process_index
            seed = seed_of("mapper step", course.seed, self.step, shard)
            with accelerator.accumulate(self.objective), in_precision(accelerator):
                found = self.objective(terms, seed)
                accelerator.backward(found["loss"])
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + value.detach().float() / course.accumulate
        length = accelerator.clip_grad_norm_(self.mapper.parameters(), course.clip)

        # Of all processes, so that they end together, whichever of them is asked to stop or fails.
        asked = torch.tensor(float(self.stop.signal is not None), device=accelerator.device)
        told = torch.stack([*losses.values(), length.float(), asked])
        *values, length, asked = accelerator.reduce(told, "mean").tolist()
        # Before the weights change: see train.loop.
        if not all(map(math.isfinite, [*values, length])):
            kept = self.checkpoint if self.checkpoint.exists() else NO_CHECKPOINT
            raise FloatingPointError(
                f"the loss of step {self.step} is {values[0]}, its gradient's length {length}; "
                f"the last good state: {kept}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_average(self.average, self.mapper, course.ema, self.step)
        self.stopping = asked > 0
        self.step += 1
        latest = dict(zip(losses, values, strict=True))
        if self.running.keys() != latest.keys():  # another stage
            self.running = latest
        self.running = {k: 0.98 * self.running[k] + 0.02 * v for k, v in latest.items()}

    def run(self, evaluate: Callable[[], None]) -> None:
        """Take the steps that are left; `evaluate` is called in the main process.

        Raises:
            FloatingPointError: see take_step.
            Stopped: a signal came; the checkpoint is saved.
        """
        saved, main = time.monotonic(), self.accelerator.is_main_process
        with tqdm(
            desc=self.course.out.name, total=self.course.steps, initial=self.step, disable=not main
        ) as bar:
            while self.step < self.course.steps:
                self.take_step()
                stage = "+".join(stage_at(self.course.stages, self.step - 1).terms)
                bar.set_postfix(stage=stage, loss=f"{self.running['loss']:.4f}", refresh=False)
                bar.update()
                last = self.step == self.course.steps
                if main and (last or self.step % self.course.evaluate_every == 0):
                    evaluate()
                due = time.monotonic() - saved >= self.course.checkpoint_seconds
                if last or due or self.stopping:
                    self.save()
                    saved = time.monotonic()
                if self.stopping and not last:
                    raise Stopped
