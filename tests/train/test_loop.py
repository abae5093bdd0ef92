"""The training loop: what a killed run leaves, and that going on changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train import loop
from train.loop import CHECKPOINT, LOG, Schedule, train, update_average, write_atomically

STEPS = 12


class Network(nn.Module):
    """Two layers and a buffer that every step moves, as a running mean would."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean().detach()
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


def fresh() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


def loss_of(network: Network) -> Callable[[int], Tensor]:
    def loss_at(step: int) -> Tensor:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        return (network(x) - x.sum(dim=1, keepdim=True)).square().mean()

    return loss_at


def stopping(loss_at: Callable[[int], Tensor], at: int) -> Callable[[int], Tensor]:
    """As `loss_at`, until the run is killed."""

    def killed_at(step: int) -> Tensor:
        if step == at:
            raise KeyboardInterrupt
        return loss_at(step)

    return killed_at


def schedule(**changes: Any) -> Schedule:
    """Checkpoints after every step, unless told otherwise."""
    return Schedule(
        **{"steps": STEPS, "learning_rate": 0.05, "checkpoint_seconds": -1.0, **changes}
    )


def nothing(average: Network) -> dict[str, float]:
    return {}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def finite(state: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("killed", [1, 5, STEPS - 1])
@pytest.mark.parametrize("seconds", [-1.0, 3.5, 1e9])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, killed: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))  # checkpoints far apart too
    plan = schedule(checkpoint_seconds=seconds)
    straight = fresh()
    expected = train(straight, loss_of(straight), tmp_path / "straight", plan, nothing)

    network = fresh()
    with pytest.raises(KeyboardInterrupt):
        train(network, stopping(loss_of(network), killed), tmp_path / "killed", plan, nothing)
    network = fresh()
    steps: list[int] = []
    loss_at = loss_of(network)

    def counted(step: int) -> Tensor:
        steps.append(step)
        return loss_at(step)

    average = train(network, counted, tmp_path / "killed", plan, nothing)
    assert same(average, expected) and same(network, straight)
    assert steps[-1] == STEPS - 1 and steps[0] <= killed
    assert steps[0] == killed or seconds > 0
    assert not same(average, fresh()) and not same(average, network)


def test_a_finished_run_given_again_takes_no_step(tmp_path: Path) -> None:
    network = fresh()
    average = train(network, loss_of(network), tmp_path, schedule(), nothing)
    again = fresh()
    assert same(train(again, stopping(loss_of(again), 0), tmp_path, schedule(), nothing), average)


def test_training_learns_and_the_average_follows(tmp_path: Path) -> None:
    network = fresh()
    loss_at = loss_of(network)
    before = loss_at(1000).item()
    average = train(network, loss_at, tmp_path, schedule(steps=300, ema=0.9), nothing)
    assert loss_at(1000).item() < before / 5
    assert loss_of(average)(1000).item() < before / 5
    assert not any(parameter.requires_grad for parameter in average.parameters())


# Losses that are not finite


def spoilt_loss(network: Network) -> Tensor:
    return network.first.weight.sum() * float("nan")


def spoilt_gradient(network: Network) -> Tensor:
    """Zero, but the slope of a square root at zero is infinite, and that times zero is NaN."""
    return (network.last.weight * 0).abs().sum().sqrt()


@pytest.mark.parametrize("spoil", [spoilt_loss, spoilt_gradient])
def test_what_is_not_finite_stops_the_run_with_the_last_good_state_kept(
    tmp_path: Path, spoil: Callable[[Network], Tensor]
) -> None:
    network = fresh()
    loss_at = loss_of(network)

    def spoilt_at(step: int) -> Tensor:
        return spoil(network) if step == 6 else loss_at(step)

    with pytest.raises(FloatingPointError, match=r"step 6.*checkpoint\.pt"):
        train(network, spoilt_at, tmp_path, schedule(), nothing)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 6 and finite(state["network"]) and finite(state["average"])
    moments = state["optimizer"]["state"].values()
    assert all(finite(moment) for moment in moments)
    assert finite(network.state_dict())

    # It is the state of a run without the spoilt step: mended, the run goes on from there.
    mended, straight = fresh(), fresh()
    average = train(mended, loss_of(mended), tmp_path, schedule(), nothing)
    expected = train(straight, loss_of(straight), tmp_path / "straight", schedule(), nothing)
    assert same(average, expected)


def test_a_network_that_was_never_good_leaves_no_checkpoint(tmp_path: Path) -> None:
    network = fresh()
    with pytest.raises(FloatingPointError, match="step 0"):
        train(network, lambda step: spoilt_gradient(network), tmp_path, schedule(), nothing)
    assert not list(tmp_path.iterdir())


# Files


def test_a_run_killed_while_it_writes_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, writes = torch.save, iter(range(100))

    def half(state: object, path: Path) -> None:
        if next(writes) < 4:
            save(state, path)
        else:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    network = fresh()
    with pytest.raises(KeyboardInterrupt):
        train(network, loss_of(network), tmp_path, schedule(), nothing)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 4


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"

    def write(unfinished: Path) -> None:
        unfinished.write_text("whole")
        assert unfinished.parent == path.parent and not path.exists()

    write_atomically(path, write)
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "whole"


def test_the_log_has_a_line_an_evaluation_with_the_figures_of_the_average(tmp_path: Path) -> None:
    network = fresh()
    evaluated: list[float] = []

    def evaluate(average: Network) -> dict[str, float]:
        evaluated.append(float(average.last.bias))
        return {"bias": evaluated[-1]}

    plan = schedule(evaluate_every=5)
    average = train(network, loss_of(network), tmp_path, plan, evaluate)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, STEPS]
    assert [line["bias"] for line in lines] == evaluated
    assert evaluated[-1] == average.last.bias.item() != network.last.bias.item()


# Rates and averages


def test_the_rate_warms_up_stays_and_falls_to_nothing() -> None:
    plan = Schedule(1000, 1.0, decay_from=0.6)
    factors = [plan.factor(step) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and factors[98] == pytest.approx(0.99)
    assert set(factors[99:600]) == {1.0}
    assert factors[800] == pytest.approx(0.5) and factors[999] == pytest.approx(1 / 400)
    assert plan.factor(1000) == plan.factor(2000) == 0.0


def test_a_groups_rate_is_a_factor_of_the_schedules(tmp_path: Path) -> None:
    moved = []
    for factor in (0.0, 1.0, 2.0):
        network = fresh()
        groups = [
            {"params": list(network.first.parameters()), "lr": factor},
            {"params": list(network.last.parameters()), "lr": 1.0},
        ]
        train(
            network, loss_of(network), tmp_path / str(factor), schedule(steps=1), nothing, groups
        )  # fmt: skip
        moved.append((network.first.weight - fresh().first.weight).norm().item())
    assert moved[0] == 0 and moved[2] == pytest.approx(2 * moved[1], rel=1e-3)


def test_the_average_moves_quicker_at_first_and_copies_buffers() -> None:
    average, network = fresh(), fresh()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
        network.seen += 3
    for step, decay in ((0, 0.1), (90, 0.91), (100_000, 0.99)):
        moved = fresh()
        update_average(moved, network, 0.99, step)
        for before, after in zip(average.parameters(), moved.parameters(), strict=True):
            torch.testing.assert_close(after - before, torch.full_like(before, 1 - decay))
        assert float(moved.seen) == 3
    assert F.mse_loss(average.last.bias, fresh().last.bias) == 0
