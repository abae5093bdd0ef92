"""Answers of methods: timed, and kept so that no finished search is ever run again.

Knows methods and files; nothing of scores.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.publish import replace_file
from data.targets import digest_of, picture_id
from eval.methods import METHODS, Answer, Bench, Method, needs_of
from eval.sets import SOURCE_SEED, EvalSet

TIMED = 5  # targets that a fast method is timed on, one at a time

Timing = Literal["alone", "share"]


@dataclass(frozen=True)
class Run:
    """A method's answer to some targets, on the processor, and what it took."""

    answer: Answer
    seconds: float
    """For each target, from its picture to its edits."""
    timing: Timing
    """Of a target alone, or its share of all that were answered together."""


def on_processor(answer: Answer) -> Answer:
    expected = None if answer.expected is None else answer.expected.cpu()
    return Answer(answer.edits.cpu(), answer.notes, expected)


def seconds_of(method: Method, bench: Bench, targets: EvalSet) -> tuple[Answer, float]:
    start = time.perf_counter()
    answer = on_processor(method.find(bench, targets))  # an accelerator has then finished, too
    return answer, time.perf_counter() - start


def timed(method: Method, bench: Bench, targets: EvalSet) -> Run:
    """Run a method; one that searches is timed on the way, another one on single targets."""
    answer, seconds = seconds_of(method, bench, targets)
    if method.optimizes:
        return Run(answer, seconds / len(targets), "share")
    # What has just run was the warm-up.
    singles = [targets.part(i, i + 1) for i in range(min(TIMED, len(targets)))]
    alone = [seconds_of(method, bench, single)[1] for single in singles]
    return Run(answer, statistics.median(alone), "alone")


def settings_of(name: str, bench: Bench, targets: EvalSet) -> dict[str, Any]:
    """Everything that decides a method's answer, but for the code."""
    method, essence = METHODS[name], bench.essence
    settings: dict[str, Any] = {
        "method": name,
        "settings": dict(method.settings),
        "parts": {part: bench.digests[part] for part in needs_of(method, bench)},
        "generator": essence.generator.fingerprint,
        "embedder": essence.embedder.fingerprint,
        "targets": digest_of(*targets.ids, *map(picture_id, targets.pictures)),
    }
    if method.optimizes:
        precision = "bf16" if bench.half else "fp32"
        settings |= {"precision": precision, "seed": bench.seed, "max_steps": bench.max_steps}
        settings |= {"truncation": essence.truncation, "recipe": bench.recipe}
    if method.per_source:
        settings |= {"sources": [SOURCE_SEED, len(bench.sources)]}
    return settings


def kept(path: Path, settings: dict[str, Any]) -> Run | None:
    """The run in a file, if it is there, whole, and of these settings."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None  # damaged: run again
    if metadata.get("settings") != json.dumps(settings, sort_keys=True):
        return None
    facts = json.loads(metadata["facts"])
    answer = Answer(tensors["edits"], tuple(facts["notes"]), tensors.get("expected"))
    return Run(answer, facts["seconds"], facts["timing"])


def keep(path: Path, run: Run, settings: dict[str, Any]) -> None:
    """Write a run, whole or not at all."""
    tensors: dict[str, Tensor] = {"edits": run.answer.edits.contiguous()}
    if run.answer.expected is not None:
        tensors["expected"] = run.answer.expected.contiguous()
    facts = {"notes": run.answer.notes, "seconds": run.seconds, "timing": run.timing}
    metadata = {"settings": json.dumps(settings, sort_keys=True), "facts": json.dumps(facts)}
    replace_file(path, save(tensors, metadata))


def run_of(folder: Path, name: str, bench: Bench, targets: EvalSet) -> Run:
    """A method's run on some targets: the one kept in `folder`, or a new one.

    Raises:
        ValueError: a part that the method needs is missing, or its edits are not finite.
        OSError: the folder cannot be written into.
    """
    path = folder / f"{targets.name} {name}.safetensors"
    settings = settings_of(name, bench, targets)
    found = kept(path, settings)
    if found is None:
        found = timed(METHODS[name], bench, targets)
        if not torch.isfinite(found.answer.edits).all():
            raise ValueError(f"{name} on {targets.name}: expected finite edits, found NaN or more")
        keep(path, found, settings)
    return found
