"""Flags that trainers of the bundled world share; torch is not imported."""

from dataclasses import dataclass
from pathlib import Path

from targetclip.command import Tracker


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every trainer of the bundled world is asked."""

    out: Path
    seed: int = 0
    evaluate_every: int = 1000
    """Steps between two lines of the log."""
    tracker: Tracker | None = None
    """Send the figures of the log to this tracker as well: tensorboard (files beside the log) or
    wandb. It needs the package of that name."""


@dataclass(frozen=True, kw_only=True)
class SeeingTraining(Training):
    """What a trainer of a network that sees pictures is asked."""

    generator: Path
    faces: int = 40_000
    """Size of the bank of pictures (that of the generator is used again)."""
    steps: int = 4000
    batch_size: int = 96
    """A third of it generated, a half of these from blended codes."""
    learning_rate: float = 1e-3
    noise: float = 0.1
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
