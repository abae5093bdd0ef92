"""Training a mapper: what it learns, what it never reads, and that an early end costs nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builds_made
import datasets
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from data import build
from data.dataset import load_pairs
from data.targets import Target, open_targets, split_of
from data.worker import SIGNALS, Stop, Stopped
from predictor.mapper import load_mapper
from targetclip.encoders.identity import identity_similarity
from targetclip.scene import random_latents
from train import mapper, mapper_loop
from train.loop import CHECKPOINT, LOG
from train.mapper import MAPPER, Config, make_scene, prepare, run
from train.mapper_data import open_pairs, target_bank
from train.mapper_objective import Objective, Stage, Validation, noisy, parse_schedule, stage_at

ROOT = Path(__file__).parents[2]
WEIGHTS = {"transfer": 1.0, "pairs": 1.0, "differences": 1.0}
SCHEDULE = ("differences:3", "transfer+differences:4")


@contextmanager
def signals_kept() -> Iterator[None]:
    """Afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A training listens to signals, and datasets keep a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with signals_kept():
        yield


@pytest.fixture(scope="module")
def pairs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty targets' pairs, of all three splits."""
    out = tmp_path_factory.mktemp("built") / "pairs"
    config = builds_made.config(tiny_world, out, targets=("drawn:30",), batch_size=15)
    with signals_kept():
        assert build.run(config) == 0
    return out


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all trainings here keep embeddings of targets."""
    return tmp_path_factory.mktemp("bank")


def configured(world: Path, bank: Path, out: Path, **changes: Any) -> Config:
    """A training that takes a second."""
    usual: dict[str, Any] = {
        "schedule": SCHEDULE,
        "targets": ("drawn:10@17", "generated:5@17"),
        "validation": ("drawn:2@23", "wide:1@23"),
        "width": 16,
        "depth": 1,
        "batch_size": 2,
        "sources": 2,
        "pairs_batch_size": 8,
        "differences_batch_size": 4,
        "learning_rate": 1e-2,
        "evaluate_every": 3,
        "checkpoint_seconds": 0.0,  # after every step
    }
    return Config(**{"out": out, "world": str(world), "bank": bank, **usual, **changes})


@pytest.fixture
def small(tiny_world: Path, bank: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations."""
    return partial(configured, world=tiny_world, bank=bank, out=tmp_path / "out")


@pytest.fixture(scope="module")
def straight(tiny_world: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "out"
    with signals_kept():
        run(configured(tiny_world, bank, out))
    return out


def state_of(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / CHECKPOINT, weights_only=True)
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def arguments(config: Config) -> list[str]:
    """A configuration as it is given on a command line."""
    flags: list[str] = []
    for name, value in asdict(config).items():
        if value not in (None, ()) and value is not False:
            values = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


# Learning


@pytest.mark.parametrize("term", WEIGHTS)
def test_every_term_is_learned(term: str, small: Callable[..., Config], pairs: Path) -> None:
    course = {"schedule": (f"{term}:20",), "learning_rate": 0.03, "checkpoint_seconds": 1e9}
    config = small(pairs=pairs, num_pairs=8, **course)
    training, _ = prepare(config, Accelerator(), Stop())

    def loss() -> float:
        with torch.no_grad():
            return sum(float(training.objective((term,), seed)[term]) for seed in range(8))

    before = loss()
    training.run(lambda: None)
    assert loss() < before - 0.02 * abs(before)


def test_the_expected_score_learns_what_edits_reach(small: Callable[..., Config]) -> None:
    config = small(schedule=("transfer:25",), checkpoint_seconds=1e9)
    training, _ = prepare(config, Accelerator(), Stop())
    before = training.objective(("transfer",), 0)["expected"].item()
    training.run(lambda: None)
    assert training.objective(("transfer",), 0)["expected"].item() < before / 2


def test_the_weight_of_a_term_scales_its_part_of_the_loss(
    small: Callable[..., Config], pairs: Path
) -> None:
    found = {}
    for weight in (1.0, 3.0):
        config = small(schedule=("pairs+differences:1",), pairs=pairs, weight_pairs=weight)
        training, _ = prepare(config, Accelerator(), Stop())
        found[weight] = training.objective(("pairs", "differences"), 5)
    difference = (found[3.0]["loss"] - found[1.0]["loss"]).item()
    assert difference == pytest.approx(2 * found[1.0]["pairs"].item(), rel=1e-5)


def test_noise_has_the_length_asked_for_and_keeps_embeddings_unit() -> None:
    unit = torch.nn.functional.normalize(torch.randn(64, 512), dim=1)
    moved = noisy(unit, 0.5, torch.Generator().manual_seed(0))
    assert torch.allclose(moved.norm(dim=1), torch.ones(64))
    # tan of the angle to where it came from
    cosines = (moved * unit).sum(dim=1)
    assert float((1 / cosines**2 - 1).sqrt().mean()) == pytest.approx(0.5, abs=0.03)
    assert noisy(unit, 0.0, torch.Generator()) is unit


# What a run leaves


def test_the_file_predicts_what_the_average_predicts(
    small: Callable[..., Config], pairs: Path
) -> None:
    course = {"schedule": ("pairs:3", "transfer:4"), "direction_decay": 0.5}
    config = small(pairs=pairs, num_pairs=8, **course)
    average = run(config)
    _, scene = make_scene(config, torch.device("cpu"))
    fingerprints = (scene.generator.fingerprint, scene.embedder.fingerprint)
    loaded, record = load_mapper(config.out / MAPPER, *fingerprints)
    embeddings = torch.randn(3, 32)
    found, expected = loaded(embeddings), average(embeddings)
    assert torch.equal(found.directions, expected.directions)
    assert torch.equal(found.expected, expected.expected)
    state = state_of(config.out)
    assert same(loaded.state_dict(), state["average"])
    assert not same(state["network"], state["average"])
    assert record.recipe["name"] == "consistent" and record.recipe["expects"] is True
    assert "8 training pairs" in record.trained_on and str(pairs.parent) not in record.trained_on
    assert [line["step"] for line in lines(config.out)] == [3, 6, 7]
    assert lines(config.out)[0]["stage"] == "pairs" and "pairs" not in lines(config.out)[1]
    judged = {"transfer_score_in_range", "transfer_score_out_of_range", "consistency_score"}
    assert judged | {"length", "expected_error", "transfer_score"} <= lines(config.out)[2].keys()
    assert (config.out / "grid.png").is_file()
    written = json.loads((config.out / "config.json").read_text())
    assert written["settings"]["recipe"]["sources"] == 2 and "torch" in written["versions"]
    assert record.recipe["recipe"]["weight_decay"] == 0.5


def test_the_scale_is_the_teachers_deviation_with_a_floor(
    small: Callable[..., Config], pairs: Path
) -> None:
    config = small(pairs=pairs, schedule=("pairs:1",))
    training, _ = prepare(config, Accelerator(), Stop())
    directions = load_pairs(pairs, "train")["direction"][:]
    deviation = directions.square().mean(dim=0).sqrt()
    expected = deviation.clamp_min(0.05 * float(deviation.mean()))
    torch.testing.assert_close(training.mapper.scale, expected)
    without, _ = prepare(small(), Accelerator(), Stop())
    assert torch.equal(without.mapper.scale[0], without.mapper.scale[-1])
    assert 0 < float(without.mapper.centre.norm()) <= 1


def test_a_mapper_of_a_rank_is_trained_as_one(small: Callable[..., Config]) -> None:
    config = small(schedule=("transfer:2",), rank=3)
    mapper = run(config)
    assert load_mapper(config.out / "mapper.safetensors")[0].config.rank == 3
    directions = mapper(torch.randn(20, mapper.config.embed_dim)).directions / mapper.scale
    assert int(torch.linalg.matrix_rank(directions.flatten(1), rtol=1e-3)) <= 3


# Identity


@torch.no_grad()
def kept(training: mapper_loop.Training) -> float:
    """How much of other sources' identity is left by the mapper's answers to some targets."""
    scene = training.objective.scene
    targets = training.objective.target_embeddings(torch.Generator().manual_seed(1))
    sources = random_latents(scene.generator, range(900, 916))
    before = scene.generator.synthesis(sources)
    each = [
        identity_similarity(scene.identity, before, scene.generator.synthesis(sources + direction))
        for direction in training.average(targets).directions
    ]
    return float(torch.stack(each).mean())


def test_the_identity_loss_is_learned_and_said_in_the_record(
    small: Callable[..., Config], who_world: Path
) -> None:
    found = {}
    for weight in (0.0, 3.0):
        config = small(
            world=str(who_world), schedule=("transfer:25",), recipe="identity",
            identity_weight=weight, direction_decay=0.0, checkpoint_seconds=1e9, learning_rate=0.03,
        )  # fmt: skip
        training, _ = prepare(replace(config, out=config.out / str(weight)), Accelerator(), Stop())
        assert training.settings["recipe"]["identity_weight"] == weight
        assert (training.settings["identity"] is None) == (weight == 0)
        training.run(lambda: None)
        found[weight] = kept(training)
    assert found[3.0] > found[0.0] + 0.02


def test_an_identity_loss_needs_a_world_with_the_model_and_a_stage_that_has_it(
    small: Callable[..., Config],
) -> None:
    with pytest.raises(ValueError, match="needs an identity model, found none"):
        run(small(recipe="identity"))
    with pytest.raises(ValueError, match="--identity-weight: it is of the transfer term"):
        run(small(identity_weight=0.1, schedule=("differences:2",)))


def test_layers_computed_again_are_no_other_training(
    small: Callable[..., Config], straight: Path
) -> None:
    config = small(checkpoint_layers=True)
    training, _ = prepare(config, Accelerator(), Stop())
    assert training.objective.scene.generator.checkpoint_layers
    shutil.copytree(straight, config.out)
    assert same(run(config).state_dict(), state_of(straight)["average"])


def test_a_checkpoint_from_before_a_setting_was_there_is_gone_on_with(
    small: Callable[..., Config], straight: Path
) -> None:
    config = small()
    shutil.copytree(straight, config.out)
    state = state_of(config.out)
    del state["settings"]["recipe"]["identity_weight"], state["settings"]["rank"]
    torch.save(state, config.out / CHECKPOINT)
    assert same(run(config).state_dict(), state["average"])


# Going on


def interrupted(
    config: Config, at: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> pytest.ExceptionInfo[BaseException]:
    """Run until a step, and end there by a kill or by a signal."""
    take_step = mapper_loop.Training.take_step

    def stopping(training: mapper_loop.Training) -> None:
        if training.step == at:
            if how == "kill":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        take_step(training)

    with monkeypatch.context() as patch:
        patch.setattr(mapper_loop.Training, "take_step", stopping)
        with pytest.raises((KeyboardInterrupt, Stopped)) as ended:
            run(config)
    return ended


@pytest.mark.parametrize(("at", "how", "seconds"), [(5, "kill", 0.0), (3, "signal", 1e9)])
def test_a_run_that_ended_early_goes_on_as_if_nothing_had_been(
    at: int,
    how: str,
    seconds: float,
    small: Callable[..., Config],
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small(checkpoint_seconds=seconds)
    ended = interrupted(config, at, how, monkeypatch)
    assert ended.type is (Stopped if how == "signal" else KeyboardInterrupt)
    assert state_of(config.out)["step"] == at + (how == "signal")
    # A line of steps that are taken again, and one cut short
    with (config.out / LOG).open("a") as log:
        log.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    average = run(config)
    found, wanted = state_of(config.out), state_of(straight)
    assert same(average.state_dict(), wanted["average"])
    assert same(found["network"], wanted["network"]) and same(found["average"], wanted["average"])
    assert lines(config.out) == lines(straight)


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_refused(
    small: Callable[..., Config],
) -> None:
    run(small(schedule=("differences:2",)))
    with pytest.raises(ValueError, match=r"other settings: noise 0\.0 not 0\.1"):
        run(small(schedule=("differences:2",), noise=0.1))
    path = small().out / CHECKPOINT
    state = state_of(small().out)
    del state["network"]["score_linear.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"another version of the mapper: .*score_linear"):
        run(small(schedule=("differences:2",)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        run(small(schedule=("differences:2",)))


def test_a_run_killed_while_it_writes_keeps_the_checkpoint_before(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    save, writes = torch.save, iter(range(100))

    def half(state: object, path: Path) -> None:
        if next(writes) < 4:
            save(state, path)
        else:
            path.write_bytes(b"half")
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run(small())
    assert state_of(small().out)["step"] == 4
    assert not list(small().out.glob(".*.tmp"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_with_the_last_good_state_kept(
    where: str, small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    differences, calls = Objective.differences, iter(range(100))

    def spoilt(self: Objective, random: torch.Generator, seed: int) -> dict[str, Tensor]:
        found = differences(self, random, seed)
        if next(calls) < 2:
            return found
        if where == "loss":
            return {"differences": found["differences"] * float("nan")}
        # The slope of a square root at zero is infinite, and that times zero is NaN.
        return {"differences": (self.mapper.direction.weight * 0).abs().sum().sqrt()}

    monkeypatch.setattr(Objective, "differences", spoilt)
    with pytest.raises(FloatingPointError, match=r"step 2 .*checkpoint\.pt"):
        run(small())
    state = state_of(small().out)
    assert state["step"] == 2
    values = [*state["network"].values(), *state["average"].values()]
    values += [v for moment in state["optimizer"]["state"].values() for v in moment.values()]
    assert all(bool(value.isfinite().all()) for value in values)
    assert not (small().out / MAPPER).exists()


# Schedules and flags


def test_a_schedule_is_stages_one_after_the_other() -> None:
    stages = parse_schedule(("pairs:3", "differences+transfer:2"), WEIGHTS)
    assert stages == (Stage(("pairs",), 3), Stage(("transfer", "differences"), 2))
    assert [stage_at(stages, step) for step in (0, 2, 3, 4)] == [stages[i] for i in (0, 0, 1, 1)]
    off = parse_schedule(("pairs+differences:3",), {**WEIGHTS, "pairs": 0.0})
    assert off == (Stage(("differences",), 3),)


@pytest.mark.parametrize(
    "text", ["", "pairs", "pairs:0", "pairs:-1", "pairs:x", "pears:3", "pairs+:3", "pairs+pairs:3"]
)
def test_a_stage_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--schedule: expected .*transfer, pairs, differences"):
        parse_schedule((text,), WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schedule": ()}, "--schedule: expected stages"),
        ({"schedule": ("pairs:2",)}, "needs --pairs"),
        ({"schedule": ("transfer:2",), "weight_transfer": 0.0}, "only terms of weight 0"),
        ({"targets": ()}, "--targets: expected some"),
        ({"num_pairs": 3}, "--num-pairs: expected a dataset"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more"),
        ({"noise": float("nan")}, "--noise: expected a number"),
        ({"recipe": "best"}, "--recipe: expected release"),
        ({"targets": ("nowhere",)}, "expected targets as"),
        ({"validation": ()}, "--validation: expected pictures"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line_and_an_exit_code(
    changes: dict[str, Any],
    told: str,
    small: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mapper.tyro, "cli", lambda *args, **kwargs: small(**changes))
    with pytest.raises(SystemExit) as ended:
        mapper.main()
    errors = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert len(errors) == 1 and errors[0].startswith("error: ") and told in errors[0]


def test_half_precision_that_needs_scaled_gradients_is_refused(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = SimpleNamespace(mixed_precision="fp16")
    monkeypatch.setattr(mapper, "Accelerator", lambda **settings: launched)
    with pytest.raises(ValueError, match="--mixed_precision: expected no or bf16, found fp16"):
        run(small())


# What is trained on


def test_num_pairs_takes_the_first_by_their_ids(small: Callable[..., Config], pairs: Path) -> None:
    _, scene = make_scene(small(), torch.device("cpu"))
    rows = sorted(load_pairs(pairs, "train").with_format(None), key=lambda row: row["id"])
    found = open_pairs(pairs, 5, scene, frozenset())
    torch.testing.assert_close(
        found.embeddings, torch.tensor([row["embedding"] for row in rows[:5]])
    )
    directions = found.directions(torch.tensor([4, 0]))
    assert torch.equal(directions[1], torch.tensor(rows[0]["direction"]))
    assert torch.equal(directions[0], torch.tensor(rows[4]["direction"]))
    assert len(open_pairs(pairs, None, scene, {rows[0]["id"]})) == len(rows) - 1
    with pytest.raises(ValueError, match=f"--num-pairs: expected 1 to {len(rows)}"):
        open_pairs(pairs, len(rows) + 1, scene, frozenset())


def test_other_splits_are_never_read(
    small: Callable[..., Config], pairs: Path, tmp_path: Path
) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(pairs, poisoned)
    shards = {path.name.partition("-")[0]: path for path in (poisoned / "data").iterdir()}
    assert {"train", "validation", "test"} == shards.keys()
    shards["validation"].write_bytes(b"poison")
    shards["test"].unlink()
    schedule = ("pairs:2", "transfer:2")
    clean = run(small(pairs=pairs, schedule=schedule, out=tmp_path / "clean"))
    again = run(small(pairs=poisoned, schedule=schedule))
    assert same(clean.state_dict(), again.state_dict())


def test_pairs_of_another_world_are_refused(
    small: Callable[..., Config], pairs: Path, tmp_path: Path
) -> None:
    _, scene = make_scene(small(), torch.device("cpu"))
    other = tmp_path / "other"
    shutil.copytree(pairs, other)
    card = (other / "README.md").read_text()
    (other / "README.md").write_text(card.replace(scene.generator.fingerprint, "0" * 64))
    with pytest.raises(ValueError, match="--pairs: expected pairs of generator"):
        open_pairs(other, None, scene, frozenset())


def test_the_bank_holds_training_targets_alone_and_is_made_once(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    _, scene = make_scene(small(), torch.device("cpu"))
    spec = "drawn:40@5"
    faces = builds_made.pictures(tmp_path / "faces")
    targets = [target for target in open_targets(spec) if isinstance(target, Target)]
    training = [target for target in targets if split_of(target.id) == "train"]
    assert 0 < len(training) < len(targets)
    left_out = {training[0].id}
    made: list[Path] = []

    def write(path: Path, embeddings: Any) -> None:
        made.append(path)
        mapper.save_bank(path, embeddings)

    specs = (spec, str(faces))
    for _ in range(2):
        _, bank = target_bank(tmp_path / "bank", specs, scene, left_out, write, lambda: None)
    assert len(made) == 1
    expected = scene.embed_targets([target.picture for target in training[1:]])
    torch.testing.assert_close(torch.from_numpy(bank[: len(expected)].copy()), expected)
    good = [target for target in open_targets(str(faces)) if isinstance(target, Target)]
    assert len(bank) == len(expected) + sum(split_of(target.id) == "train" for target in good)


def test_targets_to_validate_on_are_not_trained_on(small: Callable[..., Config]) -> None:
    config = small(targets=("drawn:10@23",), validation=("drawn:10@23",))
    with pytest.raises(ValueError, match="expected pictures to train on"):
        run(config)
    _, scene = make_scene(config, torch.device("cpu"))
    judged = Validation.open(("drawn:2@23", "wide:1@23"), scene)
    assert judged.in_range.tolist() == [True, True, False]


# Several processes


def test_two_processes_train_as_one_with_two_batches(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = small(out=tmp_path / "two", schedule=("differences:1", "transfer:2"))
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    flags = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(port)]
    done = subprocess.run(
        [*launcher, *flags, "-m", "train.mapper", *arguments(config)],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(config.out)] == [3]
    one = run(small(out=tmp_path / "one", schedule=config.schedule, accumulate=2))
    found, _ = load_mapper(config.out / MAPPER)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="processes 2 not 1"):
        run(config)
