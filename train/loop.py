"""The one resumable loop of all trainings: steps, learning rate, average, checkpoint and log.

Knows networks, processes and files; nothing of what is learned. Every step draws its data from its
own number, and from that of the process, so a killed run goes on exactly where it was.
"""

import copy
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from data.plan import changed_settings
from targetclip.command import (
    Stop,
    Stopped,
    Tracker,
    locked_folder,
    make_folder,
    one_line,
    whole_file,
    write_file,
)
from targetclip.tracking import Track, tracked

Network = TypeVar("Network", bound=nn.Module)

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
WARM_UP = 100  # steps


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    learning_rate: float
    """The highest."""
    decay_from: float | None = 0.5
    """Part of the steps after which the rate falls linearly to 0. None: it falls as a cosine from
    the first step on, and warms up for a tenth of the steps at most."""
    clip: float = math.inf
    """Longest gradient; a longer one is cut to this length."""
    ema: float = 0.999
    """Decay of the moving average of the weights."""
    evaluate_every: int = 1000
    checkpoint_seconds: float = 60.0

    def factor(self, step: int) -> float:
        """Return the learning rate of a step, as a part of the highest."""
        if self.decay_from is None:
            warm_up = max(1, min(WARM_UP, self.steps // 10))
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
            return min(1.0, (step + 1) / warm_up) * cosine
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return max(min((step + 1) / WARM_UP, left, 1.0), 0.0)


class OneProcess:
    """Stand in for an Accelerator where one process trains alone, one batch a step."""

    num_processes = gradient_accumulation_steps = 1
    process_index = 0
    is_main_process = True

    def accumulate(self, model: object) -> AbstractContextManager[None]:
        """Do nothing: the gradients of every batch are used at once."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, length: float) -> Tensor:
        """Cut gradients to a length, and return the length they had."""
        return nn.utils.clip_grad_norm_(parameters, length)

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        """Return the values, which are those of all processes."""
        return values


def plain_settings(config: Any, **more: Any) -> dict[str, Any]:
    """Return the values of a command's Config that decide weights: all but paths,
    `evaluate_every` and `tracker`. What the paths name is given as `more`, by its content."""
    free = ("evaluate_every", "tracker")
    values = {k: v for k, v in vars(config).items() if not isinstance(v, Path) and k not in free}
    return {**values, **more}


def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the current ones; quicker during the first steps."""
    move = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    with torch.no_grad():
        move(list(average.parameters()), list(network.parameters()), step)
        for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)


def trim_log(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run takes again, and a line cut short."""
    if not path.exists():
        return
    lines = path.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_file(path, "".join(kept))


@dataclass(kw_only=True)
class Trainer(Generic[Network]):
    """A network in training. Starts at the checkpoint in `out`, if there is one.
    OSError: `out` cannot be written into. ValueError: the checkpoint is damaged, of other settings
    or of another network."""

    network: Network
    optimizer: torch.optim.Optimizer | Any
    """The rate that each of its groups is made with is a factor of the schedule's."""
    out: Path
    """Folder of the checkpoint and of the log, shared by all processes."""
    schedule: Schedule
    settings: Mapping[str, Any]
    """Everything the weights depend on: a checkpoint of other settings is refused. Plain values."""
    processes: Any = field(default_factory=OneProcess)
    """An Accelerator, where several processes train together or batches are accumulated."""
    in_backward: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of the backward pass, which may compute parts of a loss again."""
    tracker: Tracker | None = None
    """Where the lines of the log are sent as well, by the main process."""
    clock: Callable[[], float] = time.monotonic
    average: Network = field(init=False)
    """The moving average of the weights, which is judged and returned."""
    step: int = field(default=0, init=False)
    """The next one to take."""
    running: dict[str, float] = field(default_factory=dict, init=False)
    """Smoothed losses."""

    def __post_init__(self) -> None:
        make_folder(self.out)
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.group_factors = [group["lr"] for group in self.optimizer.param_groups]
        if self.checkpoint.exists():
            self.restore()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's file."""
        return self.out / CHECKPOINT

    def save(self) -> None:
        """Write the checkpoint, in the main process."""
        if not self.processes.is_main_process:
            return
        state = {
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": dict(self.settings),
            "running": self.running,
        }
        with whole_file(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def restore(self) -> None:
        """Take over the checkpoint."""
        name = repr(str(self.checkpoint))
        content = io.BytesIO(self.checkpoint.read_bytes())
        try:
            state = torch.load(content, map_location="cpu", weights_only=True)
            # Checkpoints of former versions hold no settings but those of a mapper.
            saved = dict(state.get("settings", self.settings))
        except Exception as error:  # a damaged file raises nearly anything
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{name} is not a checkpoint of this trainer, or damaged: {reason}; delete it to "
                "start anew"
            ) from error
        if changed := changed_settings(saved, self.settings):
            differences = ", ".join(f"{n} {then} not {now}" for n, (then, now) in changed.items())
            raise ValueError(
                f"{name} is of other settings: {differences}; give the same as before, or another "
                "--out"
            )
        try:
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{name} is of another network, or of another version of it: {one_line(error)}; "
                "finish it by that version, or give another --out"
            ) from error
        self.step, self.running = state["step"], dict(state.get("running", {}))

    def take_step(
        self, losses_at: Callable[[int, int], Mapping[str, Tensor]], stop: Stop, model: nn.Module
    ) -> bool:
        """Take one step on all batches of all processes; return whether a process was asked to
        stop. FloatingPointError: a loss or the gradient is not finite, in any process; weights and
        checkpoint stay as they were before."""
        processes, schedule = self.processes, self.schedule
        rate = schedule.learning_rate * schedule.factor(self.step)
        for group, factor in zip(self.optimizer.param_groups, self.group_factors, strict=True):
            group["lr"] = rate * factor
        batches = processes.gradient_accumulation_steps
        losses: dict[str, Tensor] = {}
        for batch in range(batches):
            # Numbered through all processes: two of them draw what one would in two batches.
            shard = batch * processes.num_processes + processes.process_index
            with processes.accumulate(model):
                parts = losses_at(self.step, shard)
                with self.in_backward():
                    processes.backward(parts["loss"])
            for name, value in parts.items():
                losses[name] = losses.get(name, 0) + value.detach().float() / batches
        length = processes.clip_grad_norm_(self.network.parameters(), schedule.clip).float()

        # Of all processes, so that they end together, whichever of them is asked to stop or fails.
        asked = length.new_tensor(float(stop.signal is not None))
        together = torch.stack([*losses.values(), length, asked])
        *values, norm, stopping = processes.reduce(together, "mean").tolist()
        latest = dict(zip(losses, values, strict=True))
        # Before the weights change: a finite loss with a gradient that is not would spoil them one
        # step before the loss shows it, and a checkpoint may be written in between.
        if not all(map(math.isfinite, [*values, norm])):
            kept = self.checkpoint if self.checkpoint.exists() else "there is no checkpoint yet"
            raise FloatingPointError(
                f"the loss of step {self.step} is {latest['loss']}, its gradient's length {norm}; "
                f"the last good state: {kept}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_average(self.average, self.network, schedule.ema, self.step)
        self.step += 1
        before = self.running if self.running.keys() == latest.keys() else latest  # another stage
        self.running = {name: 0.98 * before[name] + 0.02 * latest[name] for name in latest}
        return bool(stopping > 0)

    def log(self, figures: Mapping[str, Any], track: Track) -> None:
        """Append a line to the log, show it, and send it to the tracker."""
        line = {"step": self.step, **self.running, **figures}
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        tqdm.write(" ".join(shown))
        track({**self.running, **figures}, self.step)

    def last_figures(self) -> dict[str, float]:
        """Return the held-out figures of the average in the log's last line, all that are finite
        numbers; none where the log is gone or of another step."""
        path = self.out / LOG
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        line: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if line.pop("step", None) != self.step:
            return {}
        return {
            name: value
            for name, value in line.items()
            if name not in self.running and isinstance(value, float) and math.isfinite(value)
        }

    def run(
        self,
        losses_at: Callable[[int, int], Mapping[str, Tensor]],
        evaluate: Callable[[Network], Mapping[str, Any]],
        stop: Stop,
        model: nn.Module | None = None,
    ) -> Network:
        """Take the steps that are left, and return the average.

        Args:
            losses_at: returns `loss` and what else is to be logged, as means over a batch. Is
                given the step and the number of the batch in it, and must depend on both alone.
            evaluate: returns held-out figures of the average for the log; called in the main
                process.
            stop: checked after every step.
            model: the network as the losses use it, perhaps in a parallel wrapper.

        Raises:
            FloatingPointError: see take_step.
            Stopped: a signal came; the checkpoint is saved.
        """
        main, every = self.processes.is_main_process, self.schedule.evaluate_every
        if main:
            trim_log(self.out / LOG, self.step)
        saved, total = self.clock(), self.schedule.steps
        tracker = self.tracker if main and self.step < total else None
        with (
            tracked(tracker, self.out, self.settings, self.step) as track,
            tqdm(desc=self.out.name, total=total, initial=self.step, disable=not main) as bar,
        ):
            while self.step < total:
                stopping = self.take_step(losses_at, stop, model or self.network)
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.running.items()}, refresh=False)
                bar.update()
                last = self.step == total
                if main and (last or self.step % every == 0):
                    self.log(evaluate(self.average), track)
                due = self.clock() - saved >= self.schedule.checkpoint_seconds
                if last or due or stopping:
                    self.save()
                    saved = self.clock()
                if stopping and not last:
                    raise Stopped
        return self.average


def train(
    network: Network,
    loss_at: Callable[[int], Tensor],
    out: Path,
    schedule: Schedule,
    evaluate: Callable[[Network], Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    groups: list[dict[str, Any]] | None = None,
    stop: Stop | None = None,
    in_backward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    tracker: Tracker | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Network:
    """Train a network by Adam in this process alone, and return the average of its weights.

    Args:
        loss_at: returns the loss of a step, and must depend on its number alone.
        evaluate, settings, in_backward, tracker: see `Trainer`.
        groups: parameter groups for Adam; `lr` in a group is a factor of the learning rate.
        stop: None: one that listens to the signals of this process from here on.

    Raises:
        ValueError, OSError, FloatingPointError, Stopped: see `Trainer`.
        BlockingIOError: another run trains in this folder.
    """
    groups = groups or [{"params": list(network.parameters())}]
    if stop is None:
        stop = Stop()
        stop.listen()
    with locked_folder(out):
        trainer = Trainer(
            network=network,
            optimizer=torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.99)),
            out=out,
            schedule=schedule,
            settings=settings,
            in_backward=in_backward,
            tracker=tracker,
            clock=clock,
        )
        return trainer.run(lambda step, shard: {"loss": loss_at(step)}, evaluate, stop)


def train_by(
    config: Any,
    network: Network,
    loss_at: Callable[[int], Tensor],
    evaluate: Callable[[Network], Mapping[str, Any]],
    *,
    out: Path | None = None,
    more: Mapping[str, Any] | None = None,
    **schedule: Any,
) -> Network:
    """Train a network as a command's Config says, and return the average of its weights.

    Args:
        config: has `out`, `steps`, `learning_rate`, `evaluate_every` and `tracker`.
        loss_at, evaluate: see `train`; `evaluate` takes no gradients.
        out: folder of checkpoint and log, where it is not the Config's.
        more: settings beside those of the Config.
        schedule: fields of the Schedule, beside or instead of the Config's.
    """
    names = ("steps", "learning_rate", "evaluate_every")
    return train(
        network,
        loss_at,
        out or config.out,
        Schedule(**{name: getattr(config, name) for name in names} | schedule),
        torch.no_grad()(evaluate),
        plain_settings(config, **more or {}),
        tracker=config.tracker,
    )
