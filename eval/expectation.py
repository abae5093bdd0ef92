"""The transfer score that a mapper expects of its answers, fitted anew once they are final.

While a mapper trains, the head of its expected score follows directions that keep changing. Once
they are final the head is fitted alone. It is linear: a ridge regression from the mapper's features
to the scores that its answers reach, on targets that neither trained the mapper nor judge it. Where
the mapper reads the trade-off, each target has a place of its own, and the head reads that as well.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data.targets import Target, of_split, open_targets
from predictor.mapper import Mapper
from predictor.mapper_file import trained_recipe
from targetclip.scene import Scene
from targetclip.seeds import seed_of

SOURCES = 4  # edited for each target
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
FEWEST = 10  # targets that what a place adds is fitted on
HIGHEST = 0.999  # largest score that is fitted: the inverse tanh of 1 is infinite


def left_out_error(
    left: Float[Tensor, "rows ranks"],
    sizes: Float[Tensor, " ranks"],
    outputs: Float[Tensor, " rows"],
    penalty: float,
) -> float:
    """Return the mean squared error of predicting each output from all others by ridge regression.

    In closed form.

    Args:
        left, sizes: left singular vectors and singular values of the centred inputs.
    """
    kept = sizes**2 / (sizes**2 + len(outputs) * penalty)
    missed = outputs - outputs.mean() - left @ (kept * (left.T @ (outputs - outputs.mean())))
    leverage = 1 / len(outputs) + left**2 @ kept  # weight of an output in its own prediction
    return float((missed / (1 - leverage)).square().mean())


def ridge(
    inputs: Float[Tensor, "rows columns"],
    outputs: Float[Tensor, " rows"],
    penalties: Sequence[float] = PENALTIES,
) -> tuple[Float[Tensor, " columns"], float]:
    """Return weights and offset of the ridge regression of least left-out error.
    ValueError: fewer than two rows."""
    rows = len(inputs)
    if rows < 2:
        raise ValueError(f"expected 2 or more rows to fit, found {rows}")
    inputs, outputs = inputs.double(), outputs.double()
    centre, spread = inputs.mean(dim=0), inputs.std(dim=0)
    spread = torch.where(spread > 0, spread, 1.0)
    left, sizes, right = torch.linalg.svd((inputs - centre) / spread, full_matrices=False)
    penalty = min(penalties, key=lambda value: left_out_error(left, sizes, outputs, value))
    shares = sizes / (sizes**2 + rows * penalty) * (left.T @ (outputs - outputs.mean()))
    weights = right.T @ shares / spread
    return weights.float(), float(outputs.mean() - weights @ centre)


def training_targets(specs: Sequence[str], count: int, scene: Scene) -> Iterator[Target]:
    """Yield the first `count` targets of each set's training split."""
    for spec in specs:
        targets = open_targets(spec, scene.generator, scene.truncation)
        yield from of_split(targets, "train", count)


def places_of(mapper: Mapper, targets: Sequence[Target], seed: int) -> Float[Tensor, " targets"]:
    """Return a random place on the trade-off for each target."""
    seeds = [seed_of("expectation place", seed, target.id) for target in targets]
    drawn = [torch.rand((), generator=torch.Generator().manual_seed(one)) for one in seeds]
    return torch.stack(drawn).to(mapper.scale.device)


@torch.no_grad()
def scores_reached(
    scene: Scene,
    mapper: Mapper,
    targets: Iterable[Target],
    seed: int,
    total: int | None = None,
    *,
    at: float | None = None,
) -> tuple[
    Float[Tensor, "targets embed"], Float[Tensor, " targets"], Float[Tensor, " targets"] | None
]:
    """Return the mapper's inputs, the transfer scores of its answers, and their places on the
    trade-off, None where the mapper reads none.

    Each target has SOURCES sources of its own.

    Args:
        total: the most targets there can be, for the progress bar.
        at: the place of all answers. None: see `places_of`.
    """
    recipe = trained_recipe(mapper.record)
    inputs, reached, places = [], [], list[Tensor]()
    remaining, at_once = iter(targets), max(1, scene.at_once // SOURCES)
    bar = tqdm(total=total, desc="expectation", unit="target")
    while batch := list(islice(remaining, at_once)):
        pictures = [target.picture for target in batch]
        embeddings = scene.embed_targets(pictures, recipe)
        seeds = [seed_of("expectation", seed, t.id, i) for t in batch for i in range(SOURCES)]
        sources = scene.latents(seeds).unflatten(0, (len(batch), SOURCES))
        judged = scene.embedder.embed_pictures(pictures)
        keep = None
        if mapper.config.tradeoff is not None:
            keep = places_of(mapper, batch, seed) if at is None else torch.tensor([at] * len(batch))
        scores = scene.score(judged, sources, mapper.edits(embeddings, sources, keep))
        inputs.append(embeddings)
        reached.append(scores.transfer)
        places += [] if keep is None else [keep]
        bar.update(len(batch))
    bar.close()
    if not inputs:
        return torch.empty(0, mapper.config.embed_dim), torch.empty(0), None
    return torch.cat(inputs), torch.cat(reached), torch.cat(places) if places else None


@torch.no_grad()
def fit_places(
    mapper: Mapper,
    inputs: Float[Tensor, "targets embed"],
    reached: Float[Tensor, " targets"],
    keep: Float[Tensor, " targets"] | None,
) -> None:
    """Fit what a place adds to the expected score, in place; nothing else of the score changes."""
    places = mapper.places(keep, len(inputs))
    assert places is not None and mapper.keep_score is not None, "the mapper reads the trade-off"
    mapper.keep_score.weight.zero_()
    expected = mapper(inputs, keep).expected
    missed = torch.atanh(reached.clamp(-HIGHEST, HIGHEST)) - torch.atanh(expected)
    solved = torch.linalg.lstsq(places.cpu(), missed[:, None].cpu()).solution
    mapper.keep_score.weight.copy_(solved.T)


@torch.no_grad()
def fit_expectation(
    scene: Scene, mapper: Mapper, specs: Sequence[str], count: int, seed: int
) -> tuple[Float[Tensor, " targets"], Float[Tensor, " targets"] | None]:
    """Fit the head of the mapper's expected score, in place.

    Args:
        specs: sets of targets, as `open_targets` takes them.
        count: targets of each set, at most. 0 changes nothing.

    Returns:
        The transfer scores that the mapper's answers to these targets reach, and their places on
        the trade-off: the origin where there is one, or else see `places_of`; None: it reads none.

    Raises:
        ValueError: fewer than two targets of the training split.
    """
    if count == 0:
        return torch.empty(0), None
    tradeoff, total = mapper.config.tradeoff, count * len(specs)
    origin = None if tradeoff is None else tradeoff.origin
    targets = training_targets(specs, count, scene)
    inputs, reached, keep = scores_reached(scene, mapper, targets, seed, total, at=origin)
    if len(reached) < 2:
        raise ValueError(
            f"--fitted: expected 2 or more targets of the training split (nine in ten) for the "
            f"expected score, found {len(reached)}: give more, or --fitted 0 to leave it as it is"
        )
    white, places = mapper.whitened_targets(inputs), mapper.places(keep, len(inputs))
    read, heads = [mapper.features(white, places), white], [mapper.score, mapper.score_linear]
    if origin is None and places is not None and mapper.keep_score is not None:
        read, heads = [*read, places], [*heads, mapper.keep_score]
    outputs = torch.atanh(reached.clamp(-HIGHEST, HIGHEST))
    weights, offset = ridge(torch.cat(read, dim=1).cpu(), outputs.cpu())
    parts = weights.split([head.in_features for head in heads])
    for head, part in zip(heads, parts, strict=True):
        head.weight.copy_(part[None])
    mapper.score.bias.fill_(offset)
    if origin is not None and len(reached) >= FEWEST:
        targets = training_targets(specs, count, scene)
        fit_places(mapper, *scores_reached(scene, mapper, targets, seed, total))
    return reached, keep
