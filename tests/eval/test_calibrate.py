"""Calibrating a mapper: the figures from scores, and a tiny world from the command to the file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.targets import of_split, open_targets, split_of
from eval.calibrate import (
    STRETCHES,
    Config,
    choose_refinement,
    default_place,
    reliability,
    run,
    steps_to_teacher,
    threshold_of,
    thresholds,
)
from eval.expectation import fit_expectation
from predictor.direction import Gate
from predictor.mapper import Mapper, load_mapper, save_mapper
from predictor.mapper_file import MapperRecord
from predictor.transfer import load_essence
from targetclip.recipes import RECIPES
from targetclip.seeds import VALIDATION_SOURCES
from targetclip.world import load_scene, load_world

# Figures

ALL = [torch.ones(4, dtype=torch.bool)]


def test_a_mapper_as_good_as_its_teacher_passes_nearly_everywhere() -> None:
    probe = torch.tensor([0.8, 0.85, 0.9, 0.95])
    threshold = threshold_of(probe, probe, probe - 0.1, ALL, probe)
    assert threshold == pytest.approx(float(torch.quantile(probe, 0.01)))
    assert (probe >= threshold).sum() == 3  # only the very lowest is taken for unlike the others


def test_many_other_targets_say_which_scores_are_unusual() -> None:
    probe, usual = torch.tensor([0.6, 0.7, 0.8, 0.9]), torch.linspace(0.4, 0.9, 501)
    assert threshold_of(probe, probe, probe - 0.1, ALL, usual) == pytest.approx(0.405)


def test_answers_that_fall_short_of_the_teacher_do_not_pass() -> None:
    mapper = torch.tensor([0.3, 0.5, 0.9, 0.9])
    threshold = threshold_of(mapper, mapper, torch.full((4,), 0.9), ALL, mapper)
    assert 0.5 < threshold <= 0.9


def test_every_set_must_hold_on_its_own() -> None:
    mapper = torch.tensor([0.95, 0.95, 0.6, 0.65])
    teacher = torch.tensor([0.7, 0.7, 0.9, 0.9])
    halves = [torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])]
    together = threshold_of(mapper, mapper, teacher, ALL, mapper)
    apart = threshold_of(mapper, mapper, teacher, halves, mapper)
    assert together < 0.65 < apart


def test_where_no_answer_of_the_mapper_will_do_none_passes() -> None:
    # High on the probe and low on other sources: the probe says nothing here.
    probe, mapper = torch.full((4,), 0.99), torch.full((4,), 0.1)
    assert threshold_of(probe, mapper, torch.full((4,), 0.9), ALL, probe) == 1.0


def test_the_shortest_refinement_that_is_nearly_the_best_is_chosen() -> None:
    losses = {
        0.01: {0: 0.5, 5: 0.3, 10: 0.2005, 30: 0.2},
        0.03: {0: 0.5, 5: 0.4, 10: 0.3, 30: 0.25},
    }
    assert choose_refinement(losses) == (0.01, 10)
    # No refinement at all is none, however good the predictions are.
    assert choose_refinement({0.01: {0: 0.1, 5: 0.3, 10: 0.3015}}) == (0.01, 5)


def test_steps_to_the_teachers_loss_count_predictions_as_none() -> None:
    losses = {0: 0.3, 5: 0.25, 10: 0.2}
    assert [steps_to_teacher(losses, loss) for loss in (0.3, 0.26, 0.2, 0.1)] == [0, 5, 10, None]


def test_reliability_tells_error_from_bias() -> None:
    reached = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = reliability(reached + 0.1, reached)
    assert found["expected_error"] == pytest.approx(0.1, abs=1e-6)
    assert found["expected_bias"] == pytest.approx(0.1, abs=1e-6)
    assert found["expected_correlation"] == pytest.approx(1.0, abs=1e-5)
    assert reliability(-reached, reached)["expected_correlation"] == pytest.approx(-1, abs=1e-5)


# Calibrating

QUICK = replace(RECIPES["consistent"], steps=2, sources=2, fresh_sources=False)


def config_of(world: Path, mapper: Path, out: Path, **changes: Any) -> Config:
    small: dict[str, Any] = {
        "targets": ("avataaars:60@29", "generated:60@29"),
        "count": 2,
        "fitted": 6,
        "sources": 2,
        "probes": 2,
    }
    return Config(mapper=mapper, out=out, world=str(world), **{**small, **changes})


def calibrated(config: Config) -> MapperRecord:
    """Calibrate by two steps everywhere and one rate."""
    return run(config, teacher=QUICK, refined_by=((0.01, 1), (0.01, 2)))


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_the_file_written_passes_the_gate_and_is_the_same_mapper(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    before, out = tiny_mapper.read_bytes(), tmp_path / "out"
    config = config_of(tiny_world, tiny_mapper, out)
    record = calibrated(config)
    mapper, found = load_mapper(out / "mapper.safetensors")
    assert found == record and tiny_mapper.read_bytes() == before
    assert torch.is_grad_enabled()
    stretch, original = record.calibration["stretch"], load_mapper(tiny_mapper)[0]
    # Scores of the stretched directions are fitted.
    scene, fitted = load_scene(load_world(str(tiny_world))), load_mapper(tiny_mapper)[0]
    for changed in (original, fitted):
        changed.scale.mul_(stretch)
    fit_expectation(scene, fitted, config.targets, config.fitted, config.seed)
    assert mapper.fingerprint == fitted.fingerprint
    heads = {"score.weight", "score.bias", "score_linear.weight"}
    was, now = original.state_dict(), mapper.state_dict()
    assert {name for name in now if not torch.equal(now[name], was[name])} == heads
    assert record.calibration["fitted"] == 12 and record.recipe["expects"] is True
    expected = [f"python -m eval.calibrate --mapper {tiny_mapper.name} --out calibrated"]
    assert [line.partition(" --world")[0] for line in record.command.splitlines()] == expected
    assert "--targets avataaars:60@29 generated:60@29 --count 2" in record.command
    each = report_of(out)["each"]
    assert record.validation["transfer_score"] == pytest.approx(sum(each["mapper_transfer"]) / 4)
    gate = Gate.of(mapper)
    assert gate.probes == 2 and gate.refine_steps in (1, 2) and gate.refine_rate == 0.01
    report = report_of(out)
    assert report["calibration"] == record.calibration
    by_stretch = {float(factor): loss for factor, loss in report["loss_by_stretch"].items()}
    assert set(by_stretch) == set(STRETCHES)
    assert by_stretch[stretch] == min(by_stretch.values())
    targets = report["each"]
    assert {split_of(name) for name in targets["id"]} == {"validation"}
    assert sum(targets["mapper_loss"]) / 4 == pytest.approx(by_stretch[stretch], rel=1e-4)
    assert targets["set"] == ["avataaars:60@29"] * 2 + ["generated:60@29"] * 2
    passing = [score >= gate.threshold for score in targets["mapper_probe"]]
    assert report["passing"]["avataaars:60@29"] == pytest.approx(sum(passing[:2]) / 2)
    losses = report["loss_by_rate_and_steps"]
    assert set(losses["loss"]["0.01"]) == {"0", "1", "2"}
    assert losses["loss"] == losses["teacher_loss"]  # of a mapper trained without identity loss
    assert (out / "reliability.png").is_file()


def test_a_mapper_that_reads_its_sources_is_calibrated_by_corrected_edits(
    tiny_world: Path, reading_mapper: Path, tmp_path: Path
) -> None:
    record = calibrated(config_of(tiny_world, reading_mapper, tmp_path))
    report, essence = report_of(tmp_path), load_essence(tiny_world, None, reading_mapper)
    essence.asked_mapper().scale.mul_(record.calibration["stretch"])
    scene, each = essence.scene, report["each"]
    targets = {
        target.id: target.picture
        for spec in ("avataaars:60@29", "generated:60@29")
        for target in of_split(open_targets(spec, scene.generator, 1.0), "validation", 2)
    }
    ws = scene.sources(2, VALIDATION_SOURCES)
    for i, name in enumerate(each["id"]):
        direction = essence.predict(targets[name])
        embedding = essence.embed_target(targets[name])
        transfer = scene.score(embedding[None], ws, direction.offsets(ws)[None]).transfer
        assert each["mapper_transfer"][i] == pytest.approx(float(transfer), abs=1e-4)
        probe = essence.probe_score(embedding, direction, 2)
        assert each["mapper_probe"][i] == pytest.approx(probe, abs=1e-4)
        alone = essence.probe_score(embedding, direction.vector, 2)
        assert probe != pytest.approx(alone, abs=1e-4)
    # Refinements of few steps start there, with the corrections held.
    losses = report["loss_by_rate_and_steps"]["loss"]["0.01"]
    assert losses["1"] == pytest.approx(losses["0"], abs=0.02)


def test_the_default_place_keeps_most_identity_of_those_near_the_best() -> None:
    curve = {
        0.0: {"transfer": 0.80, "probe": 0.82},
        0.5: {"transfer": 0.78, "probe": 0.80},
        1.0: {"transfer": 0.40, "probe": 0.42},
    }
    assert default_place(curve) == pytest.approx(0.25)
    assert default_place({keep: {"transfer": 0.5} for keep in curve}) == 1.0
    found = thresholds(0.7, curve, 0.25)  # where the probe says 0.81
    expected = {"threshold_at_0": 0.71, "threshold_at_0.5": 0.69, "threshold_at_1": 0.31}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("asked", [None, 0.3])
def test_a_mapper_that_reads_the_trade_off_gets_a_default_place_and_thresholds(
    asked: float | None, who_world: Path, tradeoff_mapper: Path, tmp_path: Path
) -> None:
    record = calibrated(config_of(who_world, tradeoff_mapper, tmp_path, keep_identity=asked))
    mapper, found = load_mapper(tmp_path / "mapper.safetensors")
    assert found == record and mapper.keep == record.calibration["keep_identity"]
    report = report_of(tmp_path)
    curve = {float(keep): row for keep, row in report["tradeoff"].items()}
    assert list(curve) == [0.0, 0.25, 0.5, 0.75, 1.0] and "identity" in curve[0.0]
    if asked is not None:
        assert mapper.keep == asked
    # The threshold moves by as much as probe scores do.
    gates = {keep: Gate.of(mapper, keep).threshold for keep in curve}
    assert gates[0.0] - gates[1.0] == pytest.approx(curve[0.0]["probe"] - curve[1.0]["probe"])
    assert Gate.of(mapper).threshold == record.calibration["threshold"]
    assert mapper.keep_score is not None and mapper.keep_score.weight.any()
    # What judged the mapper is its answer at the default place.
    essence = load_essence(who_world, None, tmp_path / "mapper.safetensors")
    scene, each = essence.scene, report["each"]
    target = next(
        iter(of_split(open_targets("avataaars:60@29", scene.generator, 1.0), "validation", 2))
    )
    ws, direction = scene.sources(2, VALIDATION_SOURCES), essence.predict(target.picture)
    embedding = essence.embed_target(target.picture)
    transfer = scene.score(embedding[None], ws, direction.offsets(ws)[None]).transfer
    assert each["mapper_transfer"][each["id"].index(target.id)] == pytest.approx(
        float(transfer), abs=1e-4
    )
    assert direction.expected is not None and direction.keep_identity == mapper.keep


def test_at_its_origin_a_mapper_is_calibrated_as_the_one_that_it_was_trained_from(
    who_world: Path, reading_mapper: Path, tradeoff_mapper: Path, tmp_path: Path
) -> None:
    start, record = load_mapper(reading_mapper)
    curve = load_mapper(tradeoff_mapper)[0]
    assert curve.config.tradeoff is not None and curve.keep_score is not None
    begun = Mapper(
        replace(curve.config, tradeoff=replace(curve.config.tradeoff, origin=0.34))
    ).requires_grad_(False)
    begun.load_state_dict({**curve.state_dict(), **start.state_dict()})
    save_mapper(begun, tmp_path / "begun.safetensors", record)
    figures = []
    for path in (reading_mapper, tmp_path / "begun.safetensors"):
        config = config_of(who_world, path, tmp_path / path.stem)
        figures.append(calibrated(config).calibration)
    plain, found = figures
    assert {name: found[name] for name in plain} == plain
    assert found["keep_identity"] == 0.34 and found["threshold_at_0"] != found["threshold_at_1"]
    mappers = [load_mapper(tmp_path / n / "mapper.safetensors")[0] for n in ("mapper", "begun")]
    embeddings = torch.randn(4, 32)
    first, second = (mapper(embeddings) for mapper in mappers)
    assert torch.equal(first.directions, second.directions)
    assert torch.equal(first.expected, second.expected)
    fitted = mappers[1].keep_score
    assert fitted is not None and not torch.equal(fitted.weight, curve.keep_score.weight)


def test_a_default_place_that_cannot_be_is_refused(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="reads no trade-off: drop the flag"):
        calibrated(config_of(tiny_world, tiny_mapper, tmp_path, keep_identity=0.5))
    with pytest.raises(ValueError, match="--keep-identity: expected a number from 0 to 1"):
        calibrated(config_of(tiny_world, tiny_mapper, tmp_path, keep_identity=1.5))


def test_another_world_is_calibrated_on_its_own_samples_by_default(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config_of(tiny_world, tiny_mapper, tmp_path, count=1, fitted=0, targets=None)
    calibrated(made)
    assert set(report_of(tmp_path)["each"]["set"]) == {"generated:2000@29", "mixed:2000@29"}
    assert "next: python -m eval.compare" in capsys.readouterr().err.splitlines()[-1]


def test_a_mapper_taught_identity_is_calibrated_by_it_and_needs_the_model(
    tiny_world: Path, who_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    mapper, record = load_mapper(tiny_mapper)
    taught = {"recipe": {**vars(RECIPES["consistent"]), "identity_weight": 0.5}}
    path = tmp_path / "taught.safetensors"
    save_mapper(mapper, path, replace(record, recipe=taught))
    calibrated(config_of(who_world, path, tmp_path / "out"))
    report = report_of(tmp_path / "out")
    assert report["each"]["mapper_loss"] != report["each"]["mapper_teacher_loss"]
    assert set(report["loss_by_rate_and_steps"]) == {"loss", "teacher_loss"}
    with pytest.raises(ValueError, match="needs an identity model"):
        calibrated(config_of(tiny_world, path, tmp_path / "without"))


def test_figures_do_not_depend_on_what_is_rendered_at_once(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    one, other = (
        calibrated(
            config_of(tiny_world, tiny_mapper, tmp_path / str(most), max_images=most, fitted=2)
        )
        for most in (None, 5)
    )
    assert one.recipe == other.recipe
    assert one.calibration == pytest.approx(other.calibration, rel=1e-3, abs=1e-4)


def test_the_expected_score_stays_as_training_left_it_if_asked(
    tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    record = calibrated(config_of(tiny_world, tiny_mapper, tmp_path / "out", fitted=0))
    now = load_mapper(tmp_path / "out" / "mapper.safetensors")[0].state_dict()
    was = load_mapper(tiny_mapper)[0].state_dict()
    for name in ("score.weight", "score.bias", "score_linear.weight"):
        assert torch.equal(now[name], was[name])
    assert record.calibration["fitted"] == 0 and "expects" not in record.recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("avataaars:1@29",)}, "validation split"),
        ({"targets": ("held-out:3",)}, "--targets: expected targets to learn from"),
        ({"mapper": Path("none.safetensors")}, "no such mapper"),
        ({"count": 0}, "--count: expected 1 or more, found 0"),
        ({"sources": 1}, "--sources: expected 2 or more, found 1"),
        ({"probes": 0}, "--probes: expected 1"),
        ({"fitted": -1}, "--fitted: expected 0"),
        ({"max_images": 0}, "--max-images: expected 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    changes: dict[str, Any], words: str, tiny_world: Path, tiny_mapper: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_world, tiny_mapper, tmp_path / "out")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        run(replace(config, **changes))
    assert "\n" not in str(caught.value)
