"""The study of the gap: values from losses, descents, spans, and a small world to a report."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.studies.gap import (
    ALONE,
    DIRECTION,
    DIRECTION_IN_SPAN,
    EDIT,
    MAPPER,
    NOTHING,
    REFINED,
    SECOND,
    TEACHER,
    Config,
    descend,
    marks_of,
    part_of,
    rows_of,
    run,
    span_of,
    steps_to,
)
from predictor.mapper import load_mapper, save_mapper
from targetclip.recipes import RECIPES


def configured(world: Path, mapper: Path, out: Path, **changes: Any) -> Config:
    small: dict[str, Any] = {"targets": 2, "sources": 2, "restarts": 2, "times": 2, "max_steps": 3}
    return Config(out=out, world=str(world), mapper=mapper, **{**small, **changes})


@pytest.fixture(scope="module")
def mapper(write_mapper: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mapper of short random directions, trained by small steps: they fit a random world."""
    path = tmp_path_factory.mktemp("m") / "mapper.safetensors"
    mapper, record = load_mapper(write_mapper(path, {}))
    mapper.scale.mul_(0.01)
    recipe = asdict(replace(RECIPES["consistent"], learning_rate=0.02))
    save_mapper(mapper, path, replace(record, recipe={"recipe": recipe}))
    return path


MISSING = (TEACHER, f"{EDIT}/1", f"{DIRECTION}/0", DIRECTION_IN_SPAN)


def bowl(edits: Tensor, targets: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Stands in for an objective: the squared distance of edits to a row's target."""
    return (edits.flatten(2) - targets[:, None]).square().sum(dim=2).mean(dim=1)


# Parts


def test_a_descent_keeps_the_lowest_loss_of_each_row_and_marks_it_on_its_curve() -> None:
    targets = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    start = torch.zeros(2, 1, 1, 2)
    found = descend(bowl, targets, start, lambda x: x, 40, 0.3, label="bowl")
    assert found.curve.shape == (len(marks_of(40)), 2)
    assert found.curve[0].tolist() == pytest.approx([5.0, 9.25])
    assert (found.curve.diff(dim=0) <= 0).all()
    assert bowl(found.edits, targets).tolist() == pytest.approx(found.curve[-1].tolist())
    assert (found.curve[-1] < 0.1 * found.curve[0]).all()
    # Each row by itself
    alone = descend(bowl, targets[:1], start[:1], lambda x: x, 40, 0.3, label="bowl")
    assert alone.edits[0].equal(found.edits[0])


def test_a_loss_that_is_not_finite_is_said() -> None:
    targets = torch.tensor([[float("nan")]])
    with pytest.raises(FloatingPointError, match="bowl: the loss of step 0"):
        descend(bowl, targets, torch.zeros(1, 1, 1, 1), lambda x: x, 1, 0.1, label="bowl")


def test_a_span_has_the_rank_of_its_columns_and_holds_them() -> None:
    random = torch.Generator().manual_seed(0)
    columns = torch.randn(12, 3, generator=random)
    basis = span_of([columns, columns @ torch.ones(3, 2)], 4)
    assert basis.shape == (3, 4, 3)
    flat = basis.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(3), atol=1e-5)
    assert torch.allclose(columns.T @ flat.T @ flat, columns.T, atol=1e-5)


def test_the_best_restart_is_chosen_target_by_target() -> None:
    def entry(losses: list[float]) -> dict[str, Any]:
        return {"loss": losses, "curve": [[9.0, 9.0], losses]}

    entries = {"a/0": entry([1.0, 5.0]), "a/1": entry([3.0, 4.0]), "b": entry([7.0, 7.0])}
    edits = {name: torch.full((2, 1, 1, 1), float(i)) for i, name in enumerate(entries)}
    rows = rows_of(entries, edits)
    assert list(rows) == ["a", "b"]
    assert rows["a"].loss.tolist() == [1.0, 4.0] and rows["a"].edits.flatten().tolist() == [0, 1]
    assert rows["a"].curve.tolist() == [[9.0, 9.0], [1.0, 4.0]]


def test_a_part_of_the_way_is_of_sums_over_targets() -> None:
    found = part_of(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), 0)
    assert found["mean"] == pytest.approx(0.5)
    assert found["low"] <= 0.5 <= found["high"]


def test_a_level_that_is_never_reached_is_said() -> None:
    assert steps_to([0.0, 0.5, 0.9], 2, 0.5) == "1"
    assert steps_to([0.0, 0.5, 0.9], 2, 0.95) == "not in 2"


# The command


def test_a_mapper_stands_between_no_edit_and_the_best_one(
    face_world: Path, mapper: Path, tmp_path: Path
) -> None:
    config = configured(face_world, mapper, tmp_path)
    report = run(config)
    values = {name: value["mean"] for name, value in report["values"].items()}
    assert values[NOTHING] == 0 and values[EDIT] == pytest.approx(1, abs=1e-4)
    assert report["values_of_directions"][DIRECTION]["mean"] == pytest.approx(1, abs=1e-4)
    # What is searched from the mapper's answer on the sources that judge is never worse.
    assert values[REFINED] >= values[MAPPER] - 1e-6
    assert report["never_worse"][f"{REFINED} than {MAPPER}"] == 1
    assert values[SECOND] >= values[MAPPER] - 1e-4  # nothing may be added
    # The mapper of this test has no correction, so its edits are its direction.
    assert values[MAPPER] == pytest.approx(values[ALONE], abs=1e-4)
    parts = report["decomposition"]
    assert parts["gained by reading the source"]["mean"] == pytest.approx(0, abs=1e-4)
    whole = 1 - values[ALONE]
    lost = ("one direction for all sources", "a direction of the mapper's span")
    names = (*lost, "amortization of the direction")
    assert sum(parts[name]["mean"] for name in names) == pytest.approx(whole, abs=1e-4)
    assert len(report["curves"][TEACHER]) == len(marks_of(3))
    text = (tmp_path / "report.md").read_text()
    assert "| mapper than no edit |" in text
    assert {"steps.png", "seconds.png", "sheet.png"} <= {f.name for f in tmp_path.iterdir()}

    # What is missing is searched, a target at a time here, and what is there is not.
    path = tmp_path / "report.json"
    kept = json.loads(path.read_text())
    removed = {name: kept["entries"].pop(name) for name in MISSING}
    path.write_text(json.dumps(kept))
    again = run(replace(config, max_images=1))["entries"]
    for name, entry in report["entries"].items():
        if name in removed:
            assert again[name]["loss"] == pytest.approx(entry["loss"], abs=1e-4), name
        else:
            assert again[name] == entry, name
    with pytest.raises(ValueError, match="is of another comparison"):
        run(configured(face_world, mapper, tmp_path, sources=3))


@pytest.mark.parametrize("option", ["targets", "restarts", "times", "max_images"])
def test_counts_below_one_are_refused(
    option: str, face_world: Path, mapper: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')}: expected 1 or more"):
        run(configured(face_world, mapper, tmp_path, **{option: 0}))
