"""Steps replayed as CUDA graphs; what needs a CUDA device is skipped where there is none."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.graphs import WARM, Replayed
from targetclip.recipes import RECIPES
from targetclip.world import load_scene, load_world

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def squares(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_(True)
    loss = (leaf.square() * y).sum()
    return loss.detach(), *torch.autograd.grad(loss, [leaf])


def test_on_a_processor_a_step_is_called_as_it_is() -> None:
    calls: list[float] = []

    def step(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(float(x))
        return (2 * x,)

    replayed = Replayed(step)
    found = [float(replayed(torch.tensor(float(i)))[0]) for i in range(2 * WARM)]
    assert found == [2.0 * i for i in range(2 * WARM)] and len(calls) == 2 * WARM


@on_cuda
def test_a_replay_computes_what_the_step_does_also_for_other_shapes() -> None:
    random, calls = torch.Generator("cuda").manual_seed(0), 0

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return squares(x, y)

    replayed = Replayed(step)
    for rows in (5, 3):
        for _ in range(WARM + 5):
            x, y = torch.randn(2, rows, 4, generator=random, device="cuda").unbind()
            for found, expected in zip(replayed(x, y), squares(x, y), strict=True):
                torch.testing.assert_close(found, expected)
    assert calls == 2 * (WARM + 1)


@on_cuda
def test_a_step_that_no_graph_can_hold_goes_on_with_a_warning() -> None:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        return (x * x.sum().item(),)  # waits for the device

    replayed, x = Replayed(step), torch.ones(3, device="cuda")
    for _ in range(WARM):
        replayed(x)
    with pytest.warns(UserWarning, match="expected steps that a CUDA graph can hold"):
        found = replayed(x)[0]
    assert found.tolist() == [3.0] * 3
    assert replayed(2 * x)[0].tolist() == [12.0] * 3


@on_cuda
@pytest.mark.parametrize("name", ["release", "consistent"])
def test_a_search_finds_the_same_with_graphs_and_without(tiny_world: Path, name: str) -> None:
    recipe = replace(RECIPES[name], steps=WARM + 6)
    scene = load_scene(load_world(str(tiny_world)), torch.device("cuda"))
    random = torch.Generator("cuda").manual_seed(0)
    embed = scene.features(scene.latents([0])).shape[1]
    targets = torch.randn(2, embed, generator=random, device="cuda")
    start = torch.zeros(2, scene.generator.num_ws, scene.generator.w_dim, device="cuda")
    with_graphs, without = (
        replace(scene, graphs=graphs).search(targets, recipe, start, [0, 1])
        for graphs in (True, False)
    )
    torch.testing.assert_close(with_graphs.directions, without.directions, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(with_graphs.loss, without.loss, rtol=1e-4, atol=1e-4)


@on_cuda
def test_images_are_those_of_the_processor_and_follow_changed_weights() -> None:
    sizes = {"resolution": 64, "w_dim": 16, "z_dim": 16, "mapping_layers": 2}
    torch.manual_seed(0)
    here = StyleGAN2(StyleGAN2Config(channels=(16,) * 5, **sizes)).requires_grad_(False)
    there = copy.deepcopy(here).cuda()
    ws = here.mapping(torch.randn(3, 16))
    with torch.backends.cudnn.flags(allow_tf32=False):
        for _ in range(2):
            expected, found = here.synthesis(ws), there.synthesis(ws.cuda()).cpu()
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            for net in (here, there):
                convs: Any = net.convs
                for conv in convs:
                    conv.weight.mul_(1.5).add_(0.1)
