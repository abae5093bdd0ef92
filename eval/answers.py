"""Time the answers of methods, and keep them: no finished search is run again.

Knows methods and files; nothing of scores.
"""

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data.targets import digest_of, picture_id
from eval.methods import METHODS, Answer, Bench, Method, needs_of
from eval.sets import EvalSet
from predictor.correction import SourceCorrection
from targetclip.directions import CORRECTION
from targetclip.weights import save_tensors

TIMED = 5  # targets that a fast method is timed on, one at a time


def find(method: Method, bench: Bench, targets: EvalSet) -> Answer:
    """Return a method's answer, on the processor, with the seconds that all of it took."""
    start = time.perf_counter()
    answer = method.find(bench, targets)
    expected = None if answer.expected is None else answer.expected.cpu()
    edits = answer.edits.cpu()  # waits until an accelerator has finished
    correction = answer.correction and answer.correction.to(edits.device)
    seconds = time.perf_counter() - start
    return replace(answer, edits=edits, correction=correction, expected=expected, seconds=seconds)


def timed(method: Method, bench: Bench, targets: EvalSet) -> Answer:
    """Run a method. One that searches is timed on the way, another one on single targets."""
    answer = find(method, bench, targets)
    if method.optimizes:
        return replace(answer, seconds=answer.seconds / len(targets), timing="share")
    # The run above was the warm-up.
    singles = [targets.part(i, i + 1) for i in range(min(TIMED, len(targets)))]
    seconds = statistics.median(find(method, bench, single).seconds for single in singles)
    return replace(answer, seconds=seconds)


def settings_of(name: str, bench: Bench, targets: EvalSet) -> dict[str, Any]:
    """Return everything that decides a method's answer, but for the code."""
    method, scene = METHODS[name], bench.scene
    settings: dict[str, Any] = {
        "method": name,
        "settings": dict(method.settings),
        "parts": {part: bench.digests[part] for part in needs_of(method, bench)},
        "generator": scene.generator.fingerprint,
        "embedder": scene.embedder.fingerprint,
        "targets": digest_of(*targets.ids, *map(picture_id, targets.pictures)),
    }
    if method.optimizes:
        settings |= {"precision": bench.precision, "seed": bench.seed}
        settings |= {"max_steps": bench.max_steps, "recipe": bench.recipe}
        settings |= {"truncation": scene.truncation}
    if method.per_source:
        settings |= {"sources": [bench.origin, len(bench.sources)]}
    return settings


def kept(path: Path, settings: dict[str, Any]) -> Answer | None:
    """Return the answer in a file, if it is there, whole, and of these settings."""
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
    parts = {name: tensors.pop(name) for name in list(tensors) if name.startswith(CORRECTION)}
    if parts:
        named = {name.removeprefix(CORRECTION): tensor for name, tensor in parts.items()}
        facts["correction"] = SourceCorrection(**named)
    return Answer(**tensors, **facts | {"notes": tuple(facts["notes"])})


def keep(path: Path, answer: Answer, settings: dict[str, Any]) -> None:
    """Write an answer, whole or not at all."""
    tensors = {"edits": answer.edits}
    if answer.expected is not None:
        tensors["expected"] = answer.expected
    if answer.correction is not None:
        parts = answer.correction.tensors()
        tensors |= {CORRECTION + name: tensor for name, tensor in parts.items()}
    facts = {"notes": answer.notes, "seconds": answer.seconds, "timing": answer.timing}
    metadata = {"settings": json.dumps(settings, sort_keys=True), "facts": json.dumps(facts)}
    save_tensors(path, tensors, metadata)


def answer_of(folder: Path, name: str, bench: Bench, targets: EvalSet) -> Answer:
    """Return a method's answer to some targets: the one kept in `folder`, or a new one.
    ValueError: a part that the method needs is missing, or its edits are not finite. OSError: the
    folder cannot be written into."""
    path = folder / f"{targets.name} {name}.safetensors"
    settings = settings_of(name, bench, targets)
    answer = kept(path, settings)
    if answer is None:
        answer = timed(METHODS[name], bench, targets)
        if not torch.isfinite(answer.on(bench.sources)).all():
            raise ValueError(f"{name} on {targets.name}: expected finite edits, found NaN or more")
        keep(path, answer, settings)
    return answer


# Reports that go on


def earlier_report(path: Path, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier run of the same comparison reported, or a report of nothing yet.
    ValueError: the file is of another comparison, or damaged."""
    same = json.loads(json.dumps(comparison))  # tuples become lists, as in the file
    if not path.exists():
        return {"comparison": same}
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--out: {str(path)!r} is damaged ({error}): delete it") from error
    if report.get("comparison") != same:
        raise ValueError(
            f"--out: {str(path)!r} is of another comparison: expected {same}, found "
            f"{report.get('comparison')}; give the same options, or another folder"
        )
    return report
