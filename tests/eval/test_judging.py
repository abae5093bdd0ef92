"""What the judges see of a picture's outside."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.drawn.sketch import SIZE
from eval.judging import Judges, edited_images, judge
from eval.reader import load_reader
from targetclip.scene import random_latents
from targetclip.world import load_parts, load_world


@pytest.fixture(scope="module")
def judges(tiny_world: Path) -> Judges:
    """With the reader of drawn faces, whatever the world makes."""
    parts = load_parts(load_world(str(tiny_world)), torch.device("cpu"))
    return Judges(parts.generator, parts.embedder, load_reader(), None, None, 8)


def images(seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, 3, SIZE, SIZE, generator=numbers) - 1


def test_only_what_an_edit_does_outside_is_perceived(judges: Judges) -> None:
    before, inside = images(0), images(0)
    inside[..., 4:-4] = images(1)[..., 4:-4]
    found = judges.perceived(before, inside)
    assert found is not None and torch.equal(found, torch.zeros(2))
    outside = before.clone()
    outside[1, ..., :4] = -outside[1, ..., :4]
    found = judges.perceived(before, outside)
    assert found is not None and found[0] == 0 and found[1] > 1e-3


def test_without_a_network_that_knows_such_pictures_nothing_is_perceived(judges: Judges) -> None:
    blind = Judges(judges.generator, judges.embedder, None, None, None, 8)
    sources = random_latents(judges.generator, range(2))
    before = blind.render(sources)
    edits = torch.zeros(1, *sources.shape[1:])
    assert judge(blind, before, edited_images(blind, sources, edits)).perceived is None
