"""One resumable training loop for every network of the bundled world.

Knows steps, learning rate, moving average, checkpoints and logging; nothing of what is trained.
Every step draws its data from its own number, so a killed run goes on exactly where it was.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

Network = TypeVar("Network", bound=nn.Module)

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    The learning rate warms up over 100 steps, stays, and from `decay_from` (a part of all steps)
    falls linearly to nothing.
    """

    steps: int
    learning_rate: float
    decay_from: float = 0.5
    ema: float = 0.999
    """Decay of the moving average of the weights, which is what the run returns."""
    checkpoint_seconds: float = 60.0
    evaluate_every: int = 1000

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a part of `learning_rate`."""
        left = (self.steps - step) / (self.steps * (1 - self.decay_from))
        return max(min((step + 1) / 100, left, 1.0), 0.0)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file, and give it its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_checkpoint(
    path: Path,
    step: int,
    network: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write everything a resumed run needs; `extra` is what else a trainer wants to find again."""
    state = {
        "step": step,
        "network": network.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        **(extra or {}),
    }
    write_atomically(path, lambda unfinished: torch.save(state, unfinished))


def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights towards the current ones; quicker during the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for mean, value in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
        for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)


def train(
    network: Network,
    loss_at: Callable[[int], Tensor],
    out: Path,
    schedule: Schedule,
    evaluate: Callable[[Network], dict[str, float]],
    groups: list[dict[str, Any]] | None = None,
) -> Network:
    """Train `network` and return the moving average of its weights.

    Args:
        loss_at: the loss of a step given its number; must depend on that number alone.
        out: folder of the checkpoint and of the log, one JSON line an evaluation. Found there,
            a checkpoint is resumed.
        evaluate: held-out figures of the averaged network, for the log.
        groups: parameter groups for Adam; `lr` in a group is a factor of the learning rate.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the last checkpoint stays.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    groups = groups or [{"params": list(network.parameters()), "lr": 1.0}]
    factors = [group["lr"] for group in groups]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    first = 0
    if (out / CHECKPOINT).exists():
        state = torch.load(out / CHECKPOINT, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    out.mkdir(parents=True, exist_ok=True)

    saved, running = time.monotonic(), 0.0
    progress = tqdm(range(first, schedule.steps), out.name, initial=first, total=schedule.steps)
    for step in progress:
        # Step
        rate = schedule.learning_rate * schedule.factor(step)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Before the weights change: a finite loss with a gradient that is not would spoil them one
        # step before the loss tells, and a checkpoint may be written in between.
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        value, length = loss.item(), nn.utils.get_total_norm(gradients).item()
        if not (math.isfinite(value) and math.isfinite(length)):
            raise FloatingPointError(
                f"the loss of step {step} is {value}, its gradient's length {length}; "
                f"the last good state is {out / CHECKPOINT}"
            )
        optimizer.step()
        update_average(average, network, schedule.ema, step)

        # Report
        running = value if step == first else 0.98 * running + 0.02 * value
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        last = step + 1 == schedule.steps
        if last or time.monotonic() - saved > schedule.checkpoint_seconds:
            save_checkpoint(out / CHECKPOINT, step + 1, network, average, optimizer)
            saved = time.monotonic()
        if last or (step + 1) % schedule.evaluate_every == 0:
            figures = {"step": step + 1, "loss": running, **evaluate(average)}
            with (out / LOG).open("a") as log:
                log.write(json.dumps(figures) + "\n")
            progress.write(" ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return average
