"""The training loop: what a killed run leaves, and that going on changes nothing."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trackers_read import distinct_seconds, scalars_of

from targetclip.command import Stop, Stopped
from train.loop import (
    CHECKPOINT,
    LOG,
    OneProcess,
    Schedule,
    Trainer,
    plain_settings,
    train,
    trim_log,
    update_average,
)

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


def trained(
    network: Network,
    out: Path,
    plan: Schedule | None = None,
    evaluate: Callable[[Network], dict[str, float]] = nothing,
    loss_at: Callable[[int], Tensor] | None = None,
    **more: Any,
) -> Network:
    """Train with settings that are always the same."""
    plan, loss_at = plan or schedule(), loss_at or loss_of(network)
    return train(network, loss_at, out, plan, evaluate, {"batch": 16}, **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def finite(state: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("killed", [1, 5, STEPS - 1])
@pytest.mark.parametrize("seconds", [-1.0, 3.5, 1e9])
def test_a_killed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, killed: int, seconds: float
) -> None:
    plan = schedule(checkpoint_seconds=seconds)
    clock = iter(range(10_000)).__next__  # checkpoints several steps apart too
    straight = fresh()
    expected = trained(straight, tmp_path / "straight", plan, clock=clock)

    network, out = fresh(), tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        trained(network, out, plan, loss_at=stopping(loss_of(network), killed), clock=clock)
    network = fresh()
    steps: list[int] = []
    loss_at = loss_of(network)

    def counted(step: int) -> Tensor:
        steps.append(step)
        return loss_at(step)

    average = trained(network, out, plan, loss_at=counted, clock=clock)
    assert same(average, expected) and same(network, straight)
    assert steps[-1] == STEPS - 1 and steps[0] <= killed
    assert steps[0] == killed or seconds > 0
    assert not same(average, fresh()) and not same(average, network)


def test_a_run_asked_to_stop_saves_its_step_and_goes_on(tmp_path: Path) -> None:
    expected = trained(fresh(), tmp_path / "straight")
    network, stop = fresh(), Stop()
    loss_at = loss_of(network)

    def asked_at(step: int) -> Tensor:
        if step == 4:
            stop.ask(15, None)
        return loss_at(step)

    plan = schedule(checkpoint_seconds=1e9)
    with pytest.raises(Stopped):
        trained(network, tmp_path / "out", plan, loss_at=asked_at, stop=stop)
    assert torch.load(tmp_path / "out" / CHECKPOINT, weights_only=True)["step"] == 5
    assert same(trained(fresh(), tmp_path / "out", plan), expected)


def test_a_finished_run_given_again_takes_no_step(tmp_path: Path) -> None:
    average = trained(fresh(), tmp_path)
    again = fresh()
    assert same(trained(again, tmp_path, loss_at=stopping(loss_of(again), 0)), average)


def test_training_learns_and_the_average_follows(tmp_path: Path) -> None:
    network = fresh()
    loss_at = loss_of(network)
    before = loss_at(1000).item()
    plan = schedule(steps=300, ema=0.9, checkpoint_seconds=1e9)
    average = trained(network, tmp_path, plan)
    assert loss_at(1000).item() < before / 5
    assert loss_of(average)(1000).item() < before / 5
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_a_longer_gradient_is_cut(tmp_path: Path) -> None:
    lengths: list[float] = []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            lengths.append(float(nn.utils.get_total_norm(gradients)))

    for clip in (0.125, 1e9):
        network = fresh()
        optimizer = Recorded(network.parameters(), lr=1.0)
        trainer = Trainer(
            network=network,
            optimizer=optimizer,
            out=tmp_path / str(clip),
            schedule=schedule(steps=1, clip=clip),
            settings={},
        )
        loss_at = loss_of(network)
        trainer.run(lambda step, shard, of=loss_at: {"loss": of(step)}, nothing, Stop())
    assert lengths[0] == pytest.approx(0.125, rel=1e-4) and lengths[1] > 0.2


# Settings


def test_a_checkpoint_of_other_settings_is_refused_in_one_line(tmp_path: Path) -> None:
    trained(fresh(), tmp_path)
    for other, difference in (
        ({"batch": 8}, "batch 16 not 8"),
        ({}, "batch 16 not None"),
        ({"batch": 16, "recipe": {"sources": 2}}, r"recipe\.sources None not 2"),
    ):
        network = fresh()
        with pytest.raises(ValueError, match=f"of other settings: {difference}; give") as refused:
            train(network, loss_of(network), tmp_path, schedule(), nothing, other)
        assert "\n" not in str(refused.value)


def test_a_checkpoint_from_before_settings_were_kept_goes_on(tmp_path: Path) -> None:
    average = trained(fresh(), tmp_path)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["settings"], state["running"]
    torch.save(state, tmp_path / CHECKPOINT)
    assert same(trained(fresh(), tmp_path), average)


def test_a_damaged_checkpoint_and_that_of_another_network_are_named(tmp_path: Path) -> None:
    trained(fresh(), tmp_path)
    other = fresh()
    other.last = nn.Linear(8, 2)
    with pytest.raises(ValueError, match=r"checkpoint\.pt' is of another network.*last"):
        trained(other, tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint\.pt' .* or damaged: .*; delete it"):
        trained(fresh(), tmp_path)


def test_settings_of_a_command_are_all_but_paths_and_what_changes_no_weight() -> None:
    @dataclass
    class Config:
        out: Path = Path("out")
        start: Path | None = None
        steps: int = 3
        evaluate_every: int = 5
        tracker: str | None = "wandb"

    assert plain_settings(Config(), start="digest") == {"steps": 3, "start": "digest"}
    assert plain_settings(Config(start=Path("a"))) == {"steps": 3}


# Losses that are not finite


def spoilt_loss(network: Network) -> Tensor:
    return network.first.weight.sum() * float("nan")


def spoilt_gradient(network: Network) -> Tensor:
    """Zero, but the slope of a square root at zero is infinite, and that times zero is NaN."""
    return (network.last.weight * 0).abs().sum().sqrt()


@pytest.mark.parametrize("clip", [1.0, math.inf])
@pytest.mark.parametrize("spoil", [spoilt_loss, spoilt_gradient])
def test_what_is_not_finite_stops_the_run_with_the_last_good_state_kept(
    tmp_path: Path, spoil: Callable[[Network], Tensor], clip: float
) -> None:
    network, plan = fresh(), schedule(clip=clip)
    loss_at = loss_of(network)

    def spoilt_at(step: int) -> Tensor:
        return spoil(network) if step == 6 else loss_at(step)

    with pytest.raises(FloatingPointError, match=r"step 6.*checkpoint\.pt"):
        trained(network, tmp_path, plan, loss_at=spoilt_at)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert state["step"] == 6 and finite(state["network"]) and finite(state["average"])
    moments = state["optimizer"]["state"].values()
    assert all(finite(moment) for moment in moments)
    assert finite(network.state_dict())

    # It is the state of a run without the spoilt step: mended, the run goes on from there.
    average = trained(fresh(), tmp_path, plan)
    assert same(average, trained(fresh(), tmp_path / "straight", plan))


def test_a_network_that_was_never_good_leaves_no_checkpoint(tmp_path: Path) -> None:
    network = fresh()
    with pytest.raises(FloatingPointError, match=r"step 0 .*there is no checkpoint yet"):
        trained(network, tmp_path, loss_at=lambda step: spoilt_gradient(network))
    assert not list(tmp_path.iterdir())


# Files


class Unfinished:
    """What ends the process while it is written."""

    def __reduce__(self) -> str:
        raise KeyboardInterrupt


class KilledInAWrite(Network):
    """Its process ends while the fifth checkpoint is written."""

    def get_extra_state(self) -> object:
        return Unfinished() if float(self.count) == 5 else None

    def set_extra_state(self, state: object) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


def test_a_run_killed_while_it_writes_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    network = KilledInAWrite()
    network.register_buffer("count", torch.zeros(()))
    with pytest.raises(KeyboardInterrupt):
        trained(network, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 4


def test_the_log_has_a_line_an_evaluation_with_the_figures_of_the_average(tmp_path: Path) -> None:
    network = fresh()
    evaluated: list[float] = []

    def evaluate(average: Network) -> dict[str, float]:
        evaluated.append(float(average.last.bias))
        return {"bias": evaluated[-1]}

    average = trained(network, tmp_path, schedule(evaluate_every=5), evaluate)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, STEPS]
    assert [line["bias"] for line in lines] == evaluated
    assert evaluated[-1] == average.last.bias.item() != network.last.bias.item()


def test_the_last_figures_are_those_of_the_last_step_without_losses(tmp_path: Path) -> None:
    def trainer() -> Trainer[Network]:
        network = fresh()
        adam = torch.optim.Adam(network.parameters(), lr=1.0)
        parts: dict[str, Any] = {"out": tmp_path, "schedule": schedule(), "settings": {}}
        return Trainer(network=network, optimizer=adam, **parts)

    first = trainer()
    assert first.last_figures() == {}
    loss_at = loss_of(first.network)
    figures = {"score": 0.5, "stage": "last", "none": float("nan")}
    first.run(lambda step, shard: {"loss": loss_at(step)}, lambda average: figures, Stop())
    assert first.last_figures() == {"score": 0.5}
    assert trainer().last_figures() == {"score": 0.5}  # as restored
    trim_log(tmp_path / LOG, STEPS - 1)
    assert trainer().last_figures() == {}


def test_a_killed_run_leaves_the_log_of_a_run_that_was_not(tmp_path: Path) -> None:
    plan = schedule(evaluate_every=5)
    for name in ("straight", "killed"):
        network = fresh()
        loss_at = loss_of(network)
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                trained(network, tmp_path / name, plan, loss_at=stopping(loss_at, 7))
            # The line of a step that is taken again, and one cut short
            with (tmp_path / name / LOG).open("a") as log:
                log.write('{"step": 8, "loss": 0}\n{"step": 9, "lo')
            network = fresh()
        trained(network, tmp_path / name, plan)
    logs = [(tmp_path / name / LOG).read_text() for name in ("straight", "killed")]
    assert logs[0] == logs[1]


def test_a_tracked_run_is_the_same_to_the_bit_and_a_killed_one_sends_what_the_log_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distinct_seconds(monkeypatch)
    plan = schedule(evaluate_every=5, checkpoint_seconds=1e9)
    expected = trained(fresh(), tmp_path / "plain", plan)
    network, stop = fresh(), Stop()
    loss_at = loss_of(network)

    def killed_at(step: int) -> Tensor:
        if step == 6:
            stop.ask(15, None)
        return loss_at(step)

    def evaluate(average: Network) -> dict[str, float]:
        return {"bias": float(average.last.bias)}

    out = tmp_path / "tracked"
    with pytest.raises(Stopped):
        trained(network, out, plan, evaluate, killed_at, stop=stop, tracker="tensorboard")
    assert scalars_of(out)["bias"].keys() == {5}
    assert same(trained(fresh(), out, plan, evaluate, tracker="tensorboard"), expected)
    lines = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, STEPS]
    for name, found in scalars_of(out).items():
        logged = {line["step"]: line[name] for line in lines}
        assert found == pytest.approx(logged, rel=1e-6), name
    assert scalars_of(out).keys() == {"loss", "bias"}


def test_only_the_main_process_sends_figures(tmp_path: Path) -> None:
    for main in (True, False):
        processes = OneProcess()
        processes.is_main_process = main
        network, out = fresh(), tmp_path / str(main)
        trainer = Trainer(
            network=network,
            optimizer=torch.optim.Adam(network.parameters(), lr=1.0),
            out=out,
            schedule=schedule(steps=1),
            settings={},
            processes=processes,
            tracker="tensorboard",
        )
        loss_at = loss_of(network)
        trainer.run(lambda step, shard, of=loss_at: {"loss": of(step)}, nothing, Stop())
        assert (out / "tensorboard").exists() is main


def test_a_log_is_cut_after_a_step(tmp_path: Path) -> None:
    trim_log(tmp_path / LOG, 3)
    assert not (tmp_path / LOG).exists()
    (tmp_path / LOG).write_text('{"step": 3}\n{"step": 4}\n{"st')
    trim_log(tmp_path / LOG, 3)
    assert (tmp_path / LOG).read_text() == '{"step": 3}\n'


# Rates and averages


def test_the_rate_warms_up_stays_and_falls_to_nothing() -> None:
    plan = Schedule(steps=1000, learning_rate=1.0, decay_from=0.6)
    factors = [plan.factor(step) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01) and factors[98] == pytest.approx(0.99)
    assert set(factors[99:600]) == {1.0}
    assert factors[800] == pytest.approx(0.5) and factors[999] == pytest.approx(1 / 400)
    assert plan.factor(1000) == plan.factor(2000) == 0.0


def test_the_rate_of_a_cosine_warms_up_for_a_tenth_at_most() -> None:
    plan = Schedule(steps=4000, learning_rate=1.0, decay_from=None)
    assert plan.factor(0) == pytest.approx(0.01) and plan.factor(99) == pytest.approx(1, abs=0.01)
    assert plan.factor(2000) == pytest.approx(0.5)
    assert plan.factor(3999) == pytest.approx(0, abs=1e-6)
    short = Schedule(steps=20, learning_rate=1.0, decay_from=None)
    assert short.factor(0) == 0.5 and short.factor(1) > 0.99


def test_a_groups_rate_is_a_factor_of_the_schedules(tmp_path: Path) -> None:
    moved = []
    for factor in (0.0, 1.0, 2.0):
        network = fresh()
        groups = [
            {"params": list(network.first.parameters()), "lr": factor},
            {"params": list(network.last.parameters()), "lr": 1.0},
        ]
        trained(network, tmp_path / str(factor), schedule(steps=1), groups=groups)
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


def test_a_second_run_into_a_folder_is_refused_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    first, out = fresh(), tmp_path / "out"

    def second_at(step: int) -> Tensor:
        if step == 3:
            with pytest.raises(BlockingIOError, match="another run is writing into") as refused:
                trained(fresh(), out)
            assert "\n" not in str(refused.value)
            raise KeyboardInterrupt
        return loss_of(first)(step)

    with pytest.raises(KeyboardInterrupt):
        trained(first, out, loss_at=second_at)
    straight, again = fresh(), fresh()
    assert same(trained(again, out), trained(straight, tmp_path / "straight"))
