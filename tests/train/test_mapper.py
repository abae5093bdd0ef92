"""Training a mapper: what it learns, what it never reads, and that an early end costs nothing."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import builds_made
import pytest
import slurm_jobs
import torch
from accelerate import Accelerator
from torch import Tensor
from trackers_read import scalars_of

from data import build
from data.dataset import load_pairs
from data.targets import Target, open_targets, split_of
from predictor.mapper import load_mapper
from predictor.mapper_file import trained_recipe
from targetclip import tracking
from targetclip.command import Stop, Stopped, guarded, parse
from targetclip.generators.stylegan2 import StyleGAN2
from train import encoder, mapper_objective
from train.loop import CHECKPOINT, LOG
from train.mapper import (
    MAPPER,
    MapperTraining,
    command_of,
    make_scene,
    prepare,
    run,
    with_targets,
)
from train.mapper_batches import (
    Mixtures,
    drawn_mixtures,
    drawn_places,
    noisy,
    training_sources,
)
from train.mapper_data import Validation, embed_unit, open_pairs, target_bank
from train.mapper_objective import Objective
from train.mapper_settings import (
    TERMS,
    Config,
    Data,
    TrainingStage,
    parse_schedule,
    stage_at,
)
from train.world import clip, generator, identity, inverter, reader

CPU = torch.device("cpu")
SCHEDULE = ("differences:3", "transfer+differences:4")


@pytest.fixture(scope="module")
def pairs(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty targets' pairs, of all three splits."""
    out = tmp_path_factory.mktemp("built") / "pairs"
    config = builds_made.config(tiny_world, out, targets=("styles:30",), batch_size=15)
    assert build.run(config) == 0
    return out


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all trainings here keep embeddings of targets."""
    return tmp_path_factory.mktemp("bank")


def arguments(world: Path, bank: Path, out: Path, **changes: Any) -> list[str]:
    """Return the flags of a training that takes a second."""
    usual: dict[str, Any] = {
        "schedule": SCHEDULE,
        "targets": ("styles:10@17", "generated:5@17"),
        "validation": ("avataaars:2@23", "styles:1@23"),
        "width": 16,
        "depth": 1,
        "batch_size": 2,
        "sources": 2,
        "pairs_batch_size": 8,
        "differences_batch_size": 4,
        "learning_rate": 1e-2,
        "evaluate_every": 3,
        "max_images": 64,
    }
    flags: list[str] = []
    for name, value in {"out": out, "world": world, "bank": bank, **usual, **changes}.items():
        if value is not False:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    return flags


def configured(world: Path, bank: Path, out: Path, **changes: Any) -> Config:
    """Return the configuration of these flags."""
    config: Config = parse(Config, "train", None, arguments(world, bank, out, **changes))
    return config


@pytest.fixture
def small(tiny_world: Path, bank: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations."""
    return partial(configured, world=tiny_world, bank=bank, out=tmp_path / "out")


@pytest.fixture(scope="module")
def straight(tiny_world: Path, bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run(configured(tiny_world, bank, out))
    return out


def state_of(out: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(out / CHECKPOINT, weights_only=True)
    return state


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


def prepared(config: Config) -> MapperTraining:
    return prepare(config, Accelerator(), Stop())


def go_on(training: MapperTraining) -> None:
    """Take the steps that are left, without the evaluations."""
    training.trainer.run(training.losses_at, lambda average: {}, Stop())


def test_the_default_targets_are_the_worlds_own(tiny_world: Path, tmp_path: Path) -> None:
    other = with_targets(Config(out=tmp_path, world=str(tiny_world))).data
    assert other.targets == ("generated:25000@17", "mixed:25000@17")
    assert other.validation == ("generated:32@23", "mixed:32@23")
    own = with_targets(Config(out=tmp_path)).data
    assert own.targets == (
        "avataaars:20000@17",
        "styles:20000@17",
        "generated:5000@17",
        "mixed:5000@17",
    )
    assert own.validation == ("avataaars:32@23", "styles:32@23")
    given = Config(out=tmp_path, world=str(tiny_world), data=Data(targets=(), validation=("a",)))
    assert with_targets(given) == given


# Learning


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_learned(term: str, small: Callable[..., Config], pairs: Path) -> None:
    rates = {"schedule": (f"{term}:20",), "learning_rate": 0.01}
    training = prepared(small(pairs=pairs, num_pairs=8, **rates))

    def loss() -> float:
        with torch.no_grad():
            return sum(float(training.objective((term,), seed)[term]) for seed in range(8))

    before = loss()
    go_on(training)
    assert loss() < before - 0.02 * abs(before)


def test_the_expected_score_learns_what_edits_reach(small: Callable[..., Config]) -> None:
    training = prepared(small(schedule=("transfer:25",)))
    before = training.objective(("transfer",), 0)["expected"].item()
    go_on(training)
    assert training.objective(("transfer",), 0)["expected"].item() < before / 2


def test_the_loss_is_the_sum_of_its_terms(small: Callable[..., Config], pairs: Path) -> None:
    training = prepared(small(schedule=("pairs+differences:1",), pairs=pairs))
    losses = training.objective(("pairs", "differences"), 5)
    assert losses.keys() == {"loss", "pairs", "differences"}
    assert losses["loss"].item() == (losses["pairs"] + losses["differences"]).item() > 0


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
    schedule = ("pairs:3", "transfer:4")
    config = small(pairs=pairs, num_pairs=8, schedule=schedule, direction_decay=0.5)
    average = run(config)
    _, _, scene = make_scene(config, CPU)
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
    assert written["config"]["direction_decay"] == 0.5 and written["config"]["width"] == 16
    assert record.recipe["recipe"]["weight_decay"] == 0.5


def test_the_record_names_the_command_and_the_scores_of_the_last_line_of_the_log(
    straight: Path, tiny_world: Path, bank: Path
) -> None:
    _, record = load_mapper(straight / MAPPER)
    last = lines(straight)[-1]
    judged = {"transfer_score", "consistency_score", "expected_error"}
    assert judged <= record.validation.keys() and "loss" not in record.validation
    assert all(last[name] == value for name, value in record.validation.items())
    assert record.datasets == ()

    words = shlex.split(record.command)
    assert words[:3] == ["python", "-m", "train.mapper"] and str(bank) not in record.command
    words[words.index("--world") + 1] = str(tiny_world)
    again: Config = parse(Config, "train", None, words[3:])
    first = configured(tiny_world, bank, straight)
    assert replace(again, out=straight, data=replace(again.data, bank=bank)) == first


def test_a_tracked_training_writes_the_same_file(
    straight: Path, small: Callable[..., Config]
) -> None:
    config = small(tracker="tensorboard")
    run(config)
    assert (config.out / MAPPER).read_bytes() == (straight / MAPPER).read_bytes()
    sent, logged = scalars_of(config.out), lines(straight)
    for name in ("transfer_score", "loss"):
        expected = {line["step"]: line[name] for line in logged}
        assert sent[name] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        (run, lambda out: Config(out=out, tracker="wandb")),
        (encoder.run, lambda out: encoder.Config(out=out, tracker="wandb")),
        (generator.run, lambda out: generator.Config(out=out, tracker="wandb")),
        (clip.run, lambda out: clip.Config(out=out, tracker="wandb")),
        *(
            (m.run, lambda out, kind=m.Config: kind(generator=out, out=out, tracker="wandb"))
            for m in (inverter, reader, identity)
        ),
    ],
)
def test_no_training_begins_without_the_package_of_its_tracker(
    trainer: Callable[[Any], object],
    config: Callable[[Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=r"^--tracker: expected the package wandb"):
        trainer(config(tmp_path / "out"))
    assert not [*tmp_path.iterdir()]


def test_the_command_names_no_path_and_who_launched_it(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "faces").mkdir()
    targets = (str(tmp_path / "faces"), f"dataset:{tmp_path / 'faces'}#train", "dataset:a/b#train")
    config = small(targets=targets, only_correction=True, pairs=tmp_path / "faces")
    command = command_of(config, {"precision": "bf16", "processes": 2})
    assert command.startswith("accelerate launch --multi_gpu --num_processes 2 -m train.mapper ")
    words = " ".join(shlex.split(command))
    assert " --targets faces dataset:faces#train dataset:a/b#train --" in words
    assert "--only-correction" in command.split() and "--pairs faces" in command
    assert "--precision bf16" in command and str(tmp_path) not in command


def test_the_scale_is_the_teachers_deviation_with_a_floor(
    small: Callable[..., Config], pairs: Path
) -> None:
    with_pairs = prepared(small(pairs=pairs, schedule=("pairs:1",))).trainer.network
    directions = load_pairs(pairs, "train")["direction"][:]
    deviation = directions.square().mean(dim=0).sqrt()
    expected = deviation.clamp_min(0.05 * float(deviation.mean()))
    torch.testing.assert_close(with_pairs.scale, expected)
    without = prepared(small()).trainer.network
    assert torch.equal(without.scale[0], without.scale[-1])
    assert 0 < float(without.centre.norm()) <= 1


def test_a_mapper_of_a_rank_is_trained_as_one(small: Callable[..., Config]) -> None:
    config = small(schedule=("transfer:2",), rank=3)
    mapper = run(config)
    assert load_mapper(config.out / "mapper.safetensors")[0].config.rank == 3
    directions = mapper(torch.randn(20, mapper.config.embed_dim)).directions / mapper.scale
    assert int(torch.linalg.matrix_rank(directions.flatten(1), rtol=1e-3)) <= 3


# Identity


@torch.no_grad()
def identity_kept(training: MapperTraining) -> float:
    """Return the mean identity score of the mapper's answers to some targets."""
    scene = training.objective.scene
    targets = training.objective.target_embeddings(torch.Generator().manual_seed(1))
    directions = training.trainer.average(targets).directions
    scores = scene.score(targets, scene.latents(range(900, 916)), directions, with_identity=True)
    assert scores.identity is not None
    return float(scores.identity.mean())


def test_the_identity_loss_is_learned_and_said_in_the_record(
    small: Callable[..., Config], who_world: Path, tmp_path: Path
) -> None:
    scores = {}
    for weight in (0.0, 3.0):
        config = small(
            out=tmp_path / str(weight),
            world=who_world,
            schedule=("transfer:12",),
            recipe="identity",
            identity_weight=weight,
            direction_decay=0.0,
            learning_rate=0.03,
        )
        training = prepared(config)
        settings = training.trainer.settings
        assert settings["recipe"]["identity_weight"] == weight
        assert (settings["identity"] is None) == (weight == 0)
        go_on(training)
        scores[weight] = identity_kept(training)
    assert scores[3.0] > scores[0.0] + 0.02


def test_an_identity_loss_needs_a_world_with_the_model_and_a_stage_that_has_it(
    small: Callable[..., Config],
) -> None:
    with pytest.raises(ValueError, match="needs an identity model, found none"):
        run(small(recipe="identity"))
    with pytest.raises(ValueError, match="--identity-weight: it is of the transfer term"):
        run(small(identity_weight=0.1, schedule=("differences:2",)))


def test_the_transfer_term_renders_at_the_size_that_is_asked_for(
    small: Callable[..., Config],
) -> None:
    training = prepared(small(schedule=("transfer@8:1", "transfer:1")))
    generator = training.objective.scene.generator
    assert isinstance(generator, StyleGAN2)
    sizes: list[int] = []

    def watch(layer: object, given: object, made: object) -> None:
        if isinstance(made, Tensor) and made.ndim == 4:
            sizes.append(made.shape[-1])

    for layer in generator.modules():
        layer.register_forward_hook(watch)
    for step, size in enumerate((8, generator.resolution)):
        sizes.clear()
        assert training.losses_at(step, 0)["transfer"].isfinite()
        assert max(sizes) == size


def test_layers_computed_again_are_no_other_training(
    small: Callable[..., Config], straight: Path
) -> None:
    config = small(checkpoint_layers=True)
    assert make_scene(config, CPU)[2].generator.checkpoint_layers
    with pytest.raises(Stopped):
        run(config, StopAt(4))
    training = prepared(small())  # goes on without them
    assert training.trainer.step == 5
    go_on(training)
    assert same(state_of(config.out)["network"], state_of(straight)["network"])


def test_a_checkpoint_from_before_a_setting_was_there_is_gone_on_with(
    small: Callable[..., Config], straight: Path
) -> None:
    config = small()
    shutil.copytree(straight, config.out)
    state = state_of(config.out)
    del state["settings"]["recipe"]["identity_weight"]
    for name in ("rank", "correction", "only_correction", "source_kinds", "start"):
        del state["settings"][name]
    torch.save(state, config.out / CHECKPOINT)
    assert same(run(config).state_dict(), state["average"])


# Corrections


CORRECTED: dict[str, Any] = {"correction": 3, "correction_width": 8, "schedule": ("transfer:4",)}


@pytest.fixture(scope="module")
def start(straight: Path) -> Path:
    """A mapper without a correction."""
    return straight / MAPPER


def transfer_loss(training: MapperTraining, batches: int = 4) -> float:
    with torch.no_grad():
        return sum(float(training.objective(("transfer",), i)["transfer"]) for i in range(batches))


@pytest.mark.parametrize("layers", ["all", "first"])
def test_a_correction_is_learned_from_a_start_that_changes_nothing(
    layers: str, small: Callable[..., Config], start: Path
) -> None:
    usual = {"start": start, "source_kinds": "generated", "schedule": ("transfer:20",)}
    plain = transfer_loss(prepared(small(**usual)))
    changes = {**CORRECTED, **usual, "correction_layers": layers, "only_correction": True}
    training = prepared(small(**changes, learning_rate=3e-3))
    assert transfer_loss(training) == plain
    go_on(training)
    assert transfer_loss(training) < plain - 0.005


def test_what_the_correction_alone_learns_leaves_directions_as_they_are(
    small: Callable[..., Config], start: Path
) -> None:
    config = small(**CORRECTED, start=start, only_correction=True)
    average, before = run(config), load_mapper(start)[0]
    embeddings, ws = torch.randn(3, 32), torch.randn(2, 6, 8)
    after = load_mapper(config.out / MAPPER)[0]
    for mapper in (average, after):
        assert torch.equal(mapper(embeddings).directions, before(embeddings).directions)
        assert mapper.correct(embeddings, ws).any()
    # The expected score is that of corrected edits.
    assert not torch.equal(after(embeddings).expected, before(embeddings).expected)
    assert after.config != before.config and after.config.width == before.config.width


def test_trained_together_directions_learn_as_well(
    small: Callable[..., Config], start: Path
) -> None:
    config = small(**CORRECTED, start=start)
    average, before = run(config), load_mapper(start)[0]
    embeddings = torch.randn(3, 32)
    assert not torch.equal(average(embeddings).directions, before(embeddings).directions)
    record = json.loads((config.out / "config.json").read_text())["settings"]
    assert record["correction"] == {
        "rank": 3,
        "width": 8,
        "layers": "all",
        "rate": 4.0,
        "decay": 0.0025,  # a quarter of the recipe's
        "uncorrected": 0.25,
    }
    assert record["start"] == before.fingerprint and record["width"] == 16
    assert record["source_kinds"] == ["generated", "mixed", "inverted"]
    loaded, saved = load_mapper(config.out / MAPPER)
    assert saved.recipe["correction"]["rank"] == 3
    assert f"started from mapper {before.fingerprint[:12]}" in saved.trained_on
    # Every way of the average is logged.
    line = lines(config.out)[-1]
    for way in ("", "one_direction_", "inverted_", "inverted_one_direction_"):
        assert f"{way}transfer_score_in_range" in line and f"{way}consistency_score" in line
    assert line["one_direction_transfer_score"] != line["transfer_score"]
    assert line["inverted_transfer_score"] != line["transfer_score"]
    again = small(start=config.out / MAPPER, out=config.out.with_name("further"))
    assert prepared(again).trainer.network.config == loaded.config


def test_a_share_of_the_targets_is_edited_by_the_direction_alone(
    small: Callable[..., Config],
) -> None:
    losses = {}
    for share in (0.0, 0.5):
        training = prepared(small(**CORRECTED, uncorrected=share, correction_decay=0.0))
        correction = training.trainer.network.correction
        assert correction is not None

        def transfer(training: MapperTraining = training) -> torch.Tensor:
            batches = [training.objective(("transfer",), seed)["transfer"] for seed in range(6)]
            return torch.stack(batches).detach()

        zero = transfer()
        numbers = torch.Generator().manual_seed(0)
        torch.nn.init.normal_(correction.mix.weight, generator=numbers)
        losses[share] = float((transfer() - zero).abs().mean())
    assert 0 < losses[0.5] < losses[0.0]


def test_a_training_of_a_correction_goes_on_as_if_nothing_had_been(
    small: Callable[..., Config], start: Path, tmp_path: Path
) -> None:
    whole = small(**CORRECTED, start=start, out=tmp_path / "whole")
    run(whole)
    config = small(**CORRECTED, start=start)
    for more in (1, 0):
        with pytest.raises(Stopped):
            run(config, StopAt(more))
    run(config)
    for name in ("network", "average"):
        assert same(state_of(config.out)[name], state_of(whole.out)[name])
    assert lines(config.out) == lines(whole.out)


def test_sources_of_each_kind_take_turns_and_depend_on_their_seeds_alone(
    small: Callable[..., Config],
) -> None:
    _, _, scene = make_scene(small(), CPU)
    seeds = list(range(7))
    drawn = scene.latents(seeds)
    assert torch.equal(training_sources(scene, seeds, ("generated",)), drawn)
    sources = training_sources(scene, seeds, ("generated", "mixed", "inverted"))
    assert torch.equal(sources, training_sources(scene, seeds, ("generated", "mixed", "inverted")))
    assert torch.equal(sources[::3], drawn[::3])
    # Thirds of the layers, of this latent and of the two after it
    assert torch.equal(sources[4], torch.cat([drawn[4, :2], drawn[5, 2:4], drawn[6, 4:]]))
    assert scene.inverter is not None
    with torch.no_grad():
        expected = scene.inverter(scene.render(drawn[[2, 5]]).clamp(-1, 1))
    torch.testing.assert_close(sources[[2, 5]], expected)
    assert not torch.equal(sources[2, 0], sources[2, -1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correction": 0}, "--correction: expected 1 or more, found 0"),
        ({"uncorrected": 1.0}, "--uncorrected: expected a number below 1"),
        ({"correction_rate": 0.0}, "--correction-rate: expected a number above 0"),
        ({"only_correction": True, "correction": 3}, "expected a mapper by --start"),
        ({"correction": 3, "schedule": ("differences:1",)}, "the transfer term teaches it"),
        ({"source_kinds": ("mixed", "mixed")}, "--source-kinds: expected different ones"),
        ({"start": "nowhere.safetensors"}, "no such mapper file"),
    ],
)
def test_a_correction_that_cannot_be_learned_is_refused(
    changes: dict[str, Any], message: str, small: Callable[..., Config]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(small(**changes))
    assert "\n" not in str(caught.value)


def test_a_start_of_another_correction_or_of_none_is_refused(
    small: Callable[..., Config], start: Path
) -> None:
    with pytest.raises(ValueError, match="expected --correction, or a --start that has one"):
        run(small(start=start, only_correction=True))
    config = small(**CORRECTED, start=start)
    run(config)
    with pytest.raises(ValueError, match=r"expected that of --start, .*rank=3.* found .*rank=4"):
        prepared(small(**{**CORRECTED, "correction": 4}, start=config.out / MAPPER))


# The trade-off between essence and identity as an input


ENDS: dict[str, Any] = {
    "keep_identity_weights": (0.01, 3.0),
    "keep_identity_decays": (1e-3, 0.3),
    "recipe": "identity",
}


def test_places_are_drawn_over_the_whole_curve_and_at_its_ends() -> None:
    for count in (1, 7, 40):
        drawn = [drawn_places(count, torch.Generator().manual_seed(seed)) for seed in range(100)]
        places = torch.stack(drawn)
        assert places.shape == (100, count) and places.min() >= 0 and places.max() <= 1
        for end in (0.0, 1.0):
            assert float((places == end).float().mean()) == pytest.approx(0.1, abs=0.07)
        assert float(places.mean()) == pytest.approx(0.5, abs=0.1)
    # Every batch has all of it, in no order.
    assert all(float((row < 0.5).float().mean()) == pytest.approx(0.5, abs=0.03) for row in places)
    assert not torch.equal(places[0].argsort(), places[1].argsort())
    again = drawn_places(40, torch.Generator().manual_seed(3))
    assert torch.equal(again, places[3])


@torch.no_grad()
def test_one_mapper_learns_longer_directions_at_0_and_more_identity_at_1(
    small: Callable[..., Config], who_world: Path
) -> None:
    schedule = ("transfer:25",)
    training = prepared(
        small(world=who_world, schedule=schedule, batch_size=8, learning_rate=0.03, **ENDS)
    )
    with torch.enable_grad():
        go_on(training)
    mapper, scene = training.trainer.network, training.objective.scene
    targets = training.objective.target_embeddings(torch.Generator().manual_seed(1))
    lengths, identities = [], []
    for keep in (0.0, 1.0):
        edits = mapper.edits(targets, sources := scene.latents(range(900, 916)), keep)
        scores = scene.score(targets, sources, edits, with_identity=True)
        assert scores.identity is not None
        lengths.append(float(edits.norm(dim=(1, 2)).mean()))
        identities.append(float(scores.identity.mean()))
    assert lengths[0] > 1.2 * lengths[1]
    assert identities[0] < identities[1] - 0.005


@torch.no_grad()
def test_each_target_is_weighed_by_its_own_place(
    small: Callable[..., Config], who_world: Path
) -> None:
    """The loss of a batch is linear in the weights, so that places add up."""
    training = prepared(small(world=who_world, **{**CORRECTED, **ENDS, "correction_decay": 0.02}))
    objective, losses = training.objective, {}
    for keep in (0.0, 0.5, 1.0):
        objective.draw_places = lambda count, random, keep=keep: torch.full((count,), keep)  # type: ignore[method-assign, misc]
        losses[keep] = float(objective(("transfer",), 3)["transfer"])
        held, _, weight = objective.weights_at(torch.tensor([keep]))
        assert objective.tradeoff is not None and weight is not None
        assert float(held) == pytest.approx(objective.tradeoff.decay(keep))
        assert float(weight) == pytest.approx(objective.tradeoff.identity_weight(keep))
    # A fresh mapper answers the same everywhere, so that nothing but the weights differs.
    assert losses[0.0] < losses[0.5] < losses[1.0]
    assert float(objective.weights_at(torch.tensor([0.5]))[1]) == pytest.approx(0.02)
    middle = objective.recipe
    assert middle.identity_weight == pytest.approx((0.01 * 3.0) ** 0.5)
    plain = prepared(
        small(
            world=who_world,
            **{**CORRECTED, "correction_decay": 0.02, "recipe": "identity"},
            identity_weight=middle.identity_weight,
            direction_decay=middle.weight_decay,
        )
    ).objective
    assert float(plain(("transfer",), 3)["transfer"]) == pytest.approx(losses[0.5], rel=1e-5)


def test_a_training_of_the_curve_goes_on_as_if_nothing_had_been_and_logs_it(
    small: Callable[..., Config], pairs: Path, who_world: Path, tmp_path: Path
) -> None:
    schedule = ("differences:1", "pairs:1", "transfer:3")
    usual = {**CORRECTED, **ENDS, "pairs": pairs, "world": who_world, "schedule": schedule}
    whole, config = small(**usual, out=tmp_path / "whole"), small(**usual)
    run(whole)
    for more in (1, 1):
        with pytest.raises(Stopped):
            run(config, StopAt(more))
    run(config)
    for name in ("network", "average"):
        assert same(state_of(config.out)[name], state_of(whole.out)[name])
    assert lines(config.out) == lines(whole.out)
    for way in ("", "keep_0_", "keep_1_"):
        for name in ("transfer_score", "identity_score", "length", "expected_error"):
            assert f"{way}{name}" in lines(config.out)[-1]
    mapper, record = load_mapper(config.out / MAPPER)
    assert mapper.config.tradeoff is not None and mapper.config.tradeoff.decays == (1e-3, 0.3)
    assert record.recipe["tradeoff"]["identity_weights"] == [0.01, 3.0]
    assert mapper.keep_gain is not None and mapper.keep_gain.weight.any()
    # Another curve is another training; a further one keeps that of its start.
    with pytest.raises(ValueError, match=r"of other settings: .*tradeoff\.decays"):
        run(small(**{**usual, "keep_identity_decays": (1e-3, 0.2)}))
    started = {**usual, "start": config.out / MAPPER, "out": tmp_path / "further"}
    with pytest.raises(ValueError, match="expected those of --start"):
        prepared(small(**{**started, "keep_identity_decays": (1e-3, 0.2)}))
    for name in ("keep_identity_weights", "keep_identity_decays"):
        del started[name]
    assert prepared(small(**started)).trainer.network.config == mapper.config
    with pytest.raises(ValueError, match="--direction-decay: every target draws its own"):
        prepared(small(**started, direction_decay=0.1))


def test_a_curve_alone_is_learned_and_at_its_origin_answers_stay(
    small: Callable[..., Config], start: Path, who_world: Path, tmp_path: Path
) -> None:
    usual = {**ENDS, "start": start, "world": who_world, "schedule": ("transfer:4",)}
    with pytest.raises(ValueError, match="--start's own, 0, between the ends"):
        prepared(small(**usual, only_tradeoff=True))
    weighs = {"world": who_world, "recipe": "identity", "schedule": ("transfer:2",)}
    run(small(**weighs, out=tmp_path / "start"))
    usual["start"] = start = tmp_path / "start" / MAPPER
    config = small(**usual, only_tradeoff=True, mixtures=0.25, batch_size=8)
    mapper, before = run(config), load_mapper(start)[0]
    stopped = replace(config, out=tmp_path / "stopped")
    with pytest.raises(Stopped):
        run(stopped, StopAt(2))
    run(stopped)
    assert same(state_of(stopped.out)["average"], state_of(config.out)["average"])
    loaded, record = load_mapper(config.out / MAPPER)
    tradeoff = loaded.config.tradeoff
    assert tradeoff is not None and tradeoff.origin is not None
    assert record.recipe["tradeoff"]["origin"] == tradeoff.origin == loaded.keep
    assert record.recipe["only_tradeoff"] is True
    nearest = replace(tradeoff, origin=None).nearest(trained_recipe(before.record))
    assert tradeoff.origin == pytest.approx(nearest, abs=0.005)
    trained = trained_recipe(record)
    assert trained.identity_weight == trained_recipe(before.record).identity_weight
    embeddings, ws = torch.randn(3, 32), mapper.scale.new_zeros(2, *mapper.scale.shape)
    assert torch.equal(loaded.edits(embeddings, ws), before.edits(embeddings, ws))
    assert torch.equal(loaded(embeddings).expected, before(embeddings).expected)
    known = before.state_dict()
    assert all(
        torch.equal(known[name], value)
        for name, value in loaded.state_dict().items()
        if name in known
    )
    for keep in (0.0, 1.0):
        assert not torch.equal(loaded(embeddings, keep).directions, before(embeddings).directions)
    plain = {name: usual[name] for name in ("world", "schedule", "start")}
    with pytest.raises(ValueError, match="--only-tradeoff: expected --keep-identity-weights"):
        prepared(small(**plain, only_tradeoff=True))
    with pytest.raises(ValueError, match=r"--only-tradeoff: .*a --start that reads no trade-off"):
        prepared(small(**{**usual, "start": config.out / MAPPER}, only_tradeoff=True))
    assert record.command.count("python -m train.mapper") == 2
    with pytest.raises(ValueError, match="--only-tradeoff: expected a mapper by --start"):
        run(small(**ENDS, world=who_world, only_tradeoff=True))


def test_a_start_that_reads_no_place_gets_a_curve(
    small: Callable[..., Config], start: Path, who_world: Path
) -> None:
    training = prepared(small(world=who_world, start=start, **ENDS))
    before, after = load_mapper(start)[0], training.trainer.network
    embeddings = torch.randn(3, 32)
    assert torch.equal(after(embeddings, 0.9).directions, before(embeddings).directions)
    go_on(training)
    first, last = (after(embeddings, keep).directions for keep in (0.0, 1.0))
    assert not torch.equal(first, last)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_identity_decays": False}, "expected both, found one"),
        ({"keep_identity_weights": (0.0, 1.0)}, "expected two finite numbers above 0"),
        ({"keep_identity_weights": (2.0, 1.0)}, "the lower one first"),
        ({"identity_weight": 0.1}, "--identity-weight: every target draws its own"),
        ({"schedule": ("differences:1",)}, "of the transfer term, which has no stage"),
        ({"recipe": "consistent"}, "needs an identity model, found none"),
    ],
)
def test_a_curve_that_cannot_be_learned_is_refused(
    changes: dict[str, Any], message: str, small: Callable[..., Config]
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(small(**{**ENDS, **changes}))
    assert "\n" not in str(caught.value)


# Mixtures


def fixed_mixtures(weights: list[float]) -> Callable[..., Mixtures]:
    """Return what draws mixtures at the same weights always."""

    def drawn(count: int, batch: int, random: torch.Generator) -> Mixtures:
        mates = drawn_mixtures(count, batch, random).mates
        return Mixtures(mates, torch.tensor([weights]).float().repeat(count, 1))

    return drawn


@pytest.mark.parametrize("curve", [False, True])
def test_a_mixture_has_its_targets_answers_and_losses_in_its_proportions(
    curve: bool, small: Callable[..., Config], who_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {**CORRECTED, "batch_size": 6, "uncorrected": 0.2, "world": who_world}
    usual |= {"recipe": "identity", **(ENDS if curve else {})}
    plain = prepared(small(**usual)).objective
    training = prepared(small(**usual, mixtures=0.5))
    objective, correction = training.objective, training.trainer.network.correction
    assert correction is not None and objective.mixtures == 3
    torch.nn.init.normal_(correction.mix.weight, std=0.1)
    plain.mapper.load_state_dict(objective.mapper.state_dict())

    def losses(of: Objective, weights: list[float]) -> dict[str, Tensor]:
        monkeypatch.setattr(mapper_objective, "drawn_mixtures", fixed_mixtures(weights))
        return of(("transfer",), 7)

    # A mixture of one target alone is that target.
    own = losses(objective, [1, 0, 0])
    torch.testing.assert_close(own["transfer"], losses(plain, [1, 0, 0])["transfer"])
    # Every mate counts, as an answer and as a goal.
    for weights in ([0, 1, 0], [0, 0, 1], [0.4, 0.6, 0], [0.2, 0.3, 0.5]):
        assert not torch.isclose(losses(objective, weights)["transfer"], own["transfer"])
    losses(objective, [0.2, 0.3, 0.5])["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_mixtures_are_of_two_and_three_targets_by_even_weights() -> None:
    mixtures = drawn_mixtures(2000, 4000, torch.Generator().manual_seed(0))
    assert mixtures.mates[-1].tolist() == [3999, 0, 1]
    torch.testing.assert_close(mixtures.weights.sum(dim=1), torch.ones(2000))
    two, three = mixtures.weights[::2], mixtures.weights[1::2]
    assert (two[:, 2] < 1e-9).all()
    # Even: the mean of each is the same, and of two any part is as likely.
    torch.testing.assert_close(three.mean(dim=0), torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    assert 0.22 < float((two[:, 0] < 0.25).float().mean()) < 0.28
    values = torch.arange(2 * 3 * 2.0).view(6, 2)
    mixed = Mixtures(
        torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    )
    assert mixed.mixed(values).tolist() == [[0, 1], [9, 10]]


def test_a_training_with_mixtures_says_so_and_one_without_says_nothing(
    small: Callable[..., Config], straight: Path
) -> None:
    assert "mixtures" not in load_mapper(straight / MAPPER)[1].recipe
    config = small(mixtures=0.5, batch_size=4, schedule=("transfer:1",))
    run(config)
    record = load_mapper(config.out / MAPPER)[1]
    assert record.recipe["mixtures"] == 0.5
    assert record.command is not None and "--mixtures 0.5" in record.command
    with pytest.raises(ValueError, match="--mixtures: expected a number below 1"):
        run(small(mixtures=1.0))


# Going on


class StopAt(Stop):
    """Is sent a signal during some step."""

    def __init__(self, step: int) -> None:
        self.left = step
        super().__init__()

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        """Read once a step."""
        self.left -= 1
        if self.left < 0 and self.number is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.number

    @signal.setter
    def signal(self, number: int | None) -> None:
        self.number = number

    def check(self) -> None:
        """The data is there already."""


@pytest.mark.parametrize("at", [0, 3])
def test_a_run_that_ended_early_goes_on_as_if_nothing_had_been(
    at: int, small: Callable[..., Config], straight: Path
) -> None:
    config = small()
    with pytest.raises(Stopped):
        run(config, StopAt(at))
    assert state_of(config.out)["step"] == at + 1
    # A line of steps that are taken again, and one cut short
    with (config.out / LOG).open("a") as log:
        log.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    average = run(config)
    resumed, whole = state_of(config.out), state_of(straight)
    assert same(average.state_dict(), whole["average"])
    assert same(resumed["network"], whole["network"])
    assert same(resumed["average"], whole["average"])
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
    with pytest.raises(ValueError, match=r"another version of it: .*score_linear"):
        run(small(schedule=("differences:2",)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        run(small(schedule=("differences:2",)))


# Schedules and flags


def test_a_schedule_is_stages_one_after_the_other() -> None:
    stages = parse_schedule(("pairs:3", "differences+transfer@8:2"))
    second = TrainingStage(("transfer", "differences"), 2, render_size=8)
    assert stages == (TrainingStage(("pairs",), 3), second)
    assert [stage_at(stages, step) for step in (0, 2, 3, 4)] == [stages[i] for i in (0, 0, 1, 1)]
    with pytest.raises(ValueError, match="expected a step before the end"):
        stage_at(stages, 5)


@pytest.mark.parametrize(
    "text", ["", "pairs", "pairs:0", "pairs:-1", "pairs:x", "pears:3", "pairs+:3", "pairs+pairs:3"]
)
def test_a_stage_written_otherwise_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--schedule: expected .*transfer, pairs, differences"):
        parse_schedule((text,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": ()}, "--schedule: expected stages"),
        ({"schedule": ("pairs:2",)}, "needs --pairs"),
        ({"schedule": ("differences@8:2",)}, "--schedule: @8 is of transfer"),
        (
            {"schedule": ("transfer@12:2",)},
            "--schedule: expected a size in px of [4, 8, 16], found 12",
        ),
        ({"learning_rate": 0.0}, "--learning-rate: expected a number above 0"),
        ({"targets": ()}, "--targets: expected some"),
        ({"num_pairs": 3}, "--num-pairs: expected a dataset"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more"),
        ({"noise": float("nan")}, "--noise: expected a number"),
        ({"recipe": "best"}, "--recipe: expected one of release"),
        ({"targets": ("nowhere",)}, "expected targets as"),
        ({"targets": ("held-out:3",)}, "--targets: expected targets to learn from"),
        ({"validation": ("held-out:3",)}, "--validation: expected targets to learn from"),
        ({"validation": ()}, "--validation: expected pictures"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line_and_an_exit_code(
    changes: dict[str, Any],
    message: str,
    small: Callable[..., Config],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert guarded(lambda: run(small(**changes)) and None, "train") == 1
    lines_of_error = capsys.readouterr().err.splitlines()
    errors = [line for line in lines_of_error if not line.startswith("loading world")]
    assert len(errors) == 1 and errors[0].startswith("train: error: ") and message in errors[0]


def test_a_precision_that_needs_scaled_gradients_is_refused(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match=r"--mixed_precision.: expected no or bf16, found 'fp16'"):
        run(small())


def test_a_flag_goes_before_accelerates_precision(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {}
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for flags in ({}, {"precision": "fp32"}):
        training = prepared(small(**flags))
        recorded = training.trainer.settings["precision"]
        losses[recorded] = training.losses_at(3, 0)["transfer"].item()
    assert losses.keys() == {"bf16", "no"}
    assert losses["bf16"] != losses["no"] == pytest.approx(losses["bf16"], abs=0.02)


# What is trained on


def test_num_pairs_takes_the_first_by_their_ids(small: Callable[..., Config], pairs: Path) -> None:
    _, _, scene = make_scene(small(), CPU)
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
    _, _, scene = make_scene(small(), CPU)
    other = tmp_path / "other"
    shutil.copytree(pairs, other)
    report = (other / "report.json").read_text()
    for name in ("generator", "embedder"):
        fingerprint = getattr(scene, name).fingerprint
        (other / "report.json").write_text(report.replace(fingerprint, "0" * 64))
        with pytest.raises(ValueError, match=f"--pairs: expected pairs of {name} .*found 0000"):
            open_pairs(other, None, scene, frozenset())


def test_the_bank_holds_training_targets_alone_and_is_made_once(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    _, recipe, scene = make_scene(small(), CPU)
    spec = "avataaars:40@5"
    faces = builds_made.pictures(tmp_path / "faces")
    targets = [target for target in open_targets(spec) if isinstance(target, Target)]
    training = [target for target in targets if split_of(target.id) == "train"]
    assert 0 < len(training) < len(targets)
    left_out = {training[0].id}
    specs, folder = (spec, str(faces)), tmp_path / "bank"
    name, bank = target_bank(folder, specs, scene, recipe, left_out)
    written = (folder / name).stat()
    again, _ = target_bank(folder, specs, scene, recipe, left_out, is_main_process=False)
    assert again == name and (folder / name).stat() == written
    assert [path.name for path in folder.iterdir()] == [name]
    expected = embed_unit(scene, [target.picture for target in training[1:]], recipe)
    torch.testing.assert_close(torch.from_numpy(bank[: len(expected)].copy()), expected)
    good = [target for target in open_targets(str(faces)) if isinstance(target, Target)]
    assert len(bank) == len(expected) + sum(split_of(target.id) == "train" for target in good)


def test_max_targets_trains_on_a_random_part_of_the_bank(small: Callable[..., Config]) -> None:
    whole = prepared(small()).objective.targets
    assert whole is not None
    parts = {}
    for count, seed in ((3, 0), (5, 0), (5, 1)):
        training = prepared(small(max_targets=count, seed=seed))
        assert training.trainer.settings["max_targets"] == count
        part = training.objective.targets
        assert part is not None and len(part) == count
        parts[count, seed] = {row.tobytes() for row in part}
        assert len(parts[count, seed]) == count <= len({row.tobytes() for row in whole})
        assert parts[count, seed] <= {row.tobytes() for row in whole}
    assert parts[3, 0] < parts[5, 0] != parts[5, 1]
    for count in (1, len(whole) + 1):
        with pytest.raises(ValueError, match=f"--max-targets: expected 2 to {len(whole)}"):
            prepared(small(max_targets=count))


def test_the_record_says_of_how_many_targets_and_nothing_where_it_is_all(
    small: Callable[..., Config], straight: Path
) -> None:
    assert "max_targets" not in load_mapper(straight / MAPPER)[1].recipe
    config = small(max_targets=4, schedule=("transfer:1",))
    run(config)
    record = load_mapper(config.out / MAPPER)[1]
    assert record.recipe["max_targets"] == 4
    assert record.trained_on.startswith("4 of the targets styles:10@17")
    assert record.command is not None and "--max-targets 4" in record.command


def test_targets_to_validate_on_are_not_trained_on(small: Callable[..., Config]) -> None:
    config = small(targets=("avataaars:10@23",), validation=("avataaars:10@23",))
    with pytest.raises(ValueError, match="expected pictures to train on"):
        run(config)
    _, recipe, scene = make_scene(config, CPU)
    judged = Validation.open(("avataaars:2@23", "styles:1@23"), scene, recipe)
    assert judged.in_range.tolist() == [True, True, False]


# Several processes


def test_two_processes_that_slurm_stopped_train_as_one_with_two_batches(
    small: Callable[..., Config], tiny_world: Path, bank: Path, tmp_path: Path
) -> None:
    schedule, out, job = ("differences:2", "transfer:10"), tmp_path / "two", tmp_path / "job"
    config = small(out=out, schedule=schedule, correction=3)
    flags = arguments(tiny_world, bank, out, schedule=schedule, correction=3)
    stopped = slurm_jobs.start("train.slurm", flags, job)
    slurm_jobs.wait_until((out / LOG).exists, stopped)
    stopped.send_signal(signal.SIGUSR1)
    _, error = stopped.communicate(timeout=300)
    assert stopped.returncode == 0, error
    assert (job / "told").read_text() == f"requeue {slurm_jobs.ID}\n"
    assert 3 <= state_of(out)["step"] < 12
    done = slurm_jobs.start("train.slurm", flags, job)
    _, error = done.communicate(timeout=300)
    assert done.returncode == 0, error
    assert [line["step"] for line in lines(out)] == [3, 6, 9, 12]
    one = run(small(out=tmp_path / "one", schedule=schedule, correction=3, accumulate=2))
    found, _ = load_mapper(config.out / MAPPER)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="processes 2 not 1"):
        run(config)
