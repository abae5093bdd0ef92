"""What a mapper expects of its answers, fitted anew once they are final.

While a mapper learns, its score's head runs after directions that go on changing. Afterwards the
head is what is left to learn, and linear: a ridge regression from all that it reads to the scores
that the answers reach, for targets that neither trained the mapper nor judge it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.targets import Target, of_split, open_targets
from predictor.mapper import Mapper
from predictor.mapper_file import trained_recipe
from predictor.transfer import EssenceTransfer
from targetclip.optimize import embed_latents
from targetclip.scene import random_latents
from targetclip.seeds import seed_of
from targetclip.targets import embed_targets

SOURCES = 4  # edited for each target
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
HIGHEST = 0.999  # score, beyond which its inverse tanh runs away


def left_out_error(
    left: Float[Tensor, "rows ranks"],
    sizes: Float[Tensor, " ranks"],
    outputs: Float[Tensor, " rows"],
    penalty: float,
) -> float:
    """Mean squared error of telling each output by the ridge regression on all the others, in
    closed form; `left` and `sizes` are of the singular values of the centred inputs."""
    kept = sizes**2 / (sizes**2 + len(outputs) * penalty)
    missed = outputs - outputs.mean() - left @ (kept * (left.T @ (outputs - outputs.mean())))
    own = 1 / len(outputs) + left**2 @ kept  # how much of each answer is its own output's doing
    return float((missed / (1 - own)).square().mean())


def ridge(
    inputs: Float[Tensor, "rows columns"], outputs: Float[Tensor, " rows"]
) -> tuple[Float[Tensor, " columns"], float]:
    """Weights and offset of the ridge regression, with the penalty under which each output is told
    best from all the others.

    Raises:
        ValueError: fewer than two rows.
    """
    rows = len(inputs)
    if rows < 2:
        raise ValueError(f"expected 2 or more rows to fit, found {rows}")
    inputs, outputs = inputs.double(), outputs.double()
    centre, spread = inputs.mean(dim=0), inputs.std(dim=0)
    spread = torch.where(spread > 0, spread, 1.0)
    left, sizes, right = torch.linalg.svd((inputs - centre) / spread, full_matrices=False)
    penalty = min(PENALTIES, key=lambda each: left_out_error(left, sizes, outputs, each))
    shares = sizes / (sizes**2 + rows * penalty) * (left.T @ (outputs - outputs.mean()))
    weights = right.T @ shares / spread
    return weights.float(), float(outputs.mean() - weights @ centre)


def training_targets(
    specs: Sequence[str], count: int, essence: EssenceTransfer
) -> Iterator[Target]:
    """The first so many targets of each set's training split."""
    for spec in specs:
        yield from of_split(
            open_targets(spec, essence.generator, essence.truncation), "train", count
        )


@torch.no_grad()
def scores_reached(
    essence: EssenceTransfer,
    mapper: Mapper,
    targets: Iterable[Target],
    seed: int,
    most: int | None = None,
) -> tuple[Float[Tensor, "targets embed"], Float[Tensor, " targets"]]:
    """What the mapper is given of each target, and the transfer score that its answer reaches on
    sources of the target's own. There are `most` targets at most, which only the bar is told."""
    recipe, wanted, reached = trained_recipe(mapper.record), [], []
    remaining, at_once = iter(targets), max(1, essence.max_images // SOURCES)
    bar = tqdm(total=most, desc="expectation", unit="target")
    while some := list(islice(remaining, at_once)):
        pictures = [target.picture for target in some]
        given = embed_targets(essence.generator, essence.embedder, pictures, recipe)
        judged = essence.embedder.embed_pictures(pictures)
        seeds = [seed_of("expectation", seed, each.id, i) for each in some for i in range(SOURCES)]
        sources = random_latents(essence.generator, seeds, essence.truncation)
        edited = embed_latents(
            essence.generator,
            essence.embedder,
            sources + mapper(given).directions.repeat_interleave(SOURCES, dim=0),
            "consistent",
            essence.max_images,
        )
        scores = F.cosine_similarity(edited, judged.repeat_interleave(SOURCES, dim=0))
        wanted.append(given)
        reached.append(scores.unflatten(0, (len(some), SOURCES)).mean(dim=1))
        bar.update(len(some))
    bar.close()
    if not wanted:
        return torch.empty(0, mapper.config.embed_dim), torch.empty(0)
    return torch.cat(wanted), torch.cat(reached)


@torch.no_grad()
def fit_expectation(
    essence: EssenceTransfer, mapper: Mapper, specs: Sequence[str], count: int, seed: int
) -> int:
    """Fit the head of the mapper's expected score, in place, on up to `count` targets of each set;
    how many they were. With a count of 0 nothing changes.

    Raises:
        ValueError: fewer than two targets of the training split.
    """
    if count == 0:
        return 0
    targets = training_targets(specs, count, essence)
    wanted, reached = scores_reached(essence, mapper, targets, seed, count * len(specs))
    if len(reached) < 2:
        raise ValueError(
            f"--fitted: expected 2 or more targets of the training split (nine in ten) for the "
            f"expected score, found {len(reached)}: give more, or --fitted 0 to leave it as it is"
        )
    white = mapper.whitened_targets(wanted)
    features = mapper.features(white)
    goal = torch.atanh(reached.clamp(-HIGHEST, HIGHEST))
    weights, offset = ridge(torch.cat([features, white], dim=1).cpu(), goal.cpu())
    mapper.score.weight.copy_(weights[None, : features.shape[1]])
    mapper.score_linear.weight.copy_(weights[None, features.shape[1] :])
    mapper.score.bias.fill_(offset)
    return len(reached)
