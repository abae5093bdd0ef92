"""Grids of pictures to look at, their targets chosen by rank and never by eye.

Knows edits and how they are rendered; nothing of how they were found.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from eval.sets import EvalSet
from eval.summary import Trial, by_rank
from targetclip.media.images import labelled_grid, tensor_to_pictures

SHOWN = 8  # sources in a row

Edited = Callable[[str, int], Float[Tensor, "sources 3 height width"]]
"""Edited sources of a method and a target, by the method's name and the target's place."""


def method_grid(
    name: str, trial: Trial, targets: EvalSet, sources: list[Image.Image], edited: Edited
) -> Image.Image:
    """The sources, then a method's best, median and worst target with its edits."""
    scores = torch.as_tensor(trial.scores["transfer"])
    rows = {"sources": [Image.new("RGB", sources[0].size, "white"), *sources]}
    for rank, i in by_rank(scores).items():
        label = f"{name}, {rank} of {len(scores)}: {targets.origins[i]}, {float(scores[i]):.3f}"
        rows[label] = [targets.pictures[i], *tensor_to_pictures(edited(name, i)[:SHOWN])]
    return labelled_grid(None, rows)


def comparison_grid(
    trials: Mapping[str, Trial],
    place: int,
    targets: EvalSet,
    sources: list[Image.Image],
    edited: Edited,
) -> Image.Image:
    """A target, and what each method that was asked makes of the sources."""
    rows = {"sources": sources}
    for name, trial in trials.items():
        if place < len(trial):
            score = float(trial.scores["transfer"][place])
            pictures = tensor_to_pictures(edited(name, place)[:SHOWN])
            rows[f"{name}: transfer score {score:.3f}"] = pictures
    return labelled_grid(targets.pictures[place], rows, targets.origins[place])


def grids(
    trials: Mapping[str, Trial],
    reference: str,
    first: int,
    targets: EvalSet,
    sources: list[Image.Image],
    edited: Edited,
) -> dict[str, Image.Image]:
    """A grid of each method, and one of all on the same target, by their files' names.

    That target is the reference's median among the first few, which every method has answered.
    """
    found = {
        f"{targets.name} {name}": method_grid(name, trial, targets, sources, edited)
        for name, trial in trials.items()
    }
    place = by_rank(torch.as_tensor(trials[reference].scores["transfer"][:first]))["median"]
    found[f"{targets.name} all"] = comparison_grid(trials, place, targets, sources, edited)
    return found
