"""A worker finds right directions, loses only the time since a checkpoint, and holds nobody up."""

import hashlib
import io
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.claims import create, look
from data.pairs import Failure, read_chunk
from data.plan import Plan, make_plan
from data.targets import open_targets
from data.teacher import (
    MOST_TARGETS,
    Teacher,
    fitting_batch_size,
    make_teacher,
    memory,
    time_step,
)
from data.worker import Worker
from targetclip.command import SIGNALS, Stop, Stopped
from targetclip.optimize import Optimized, Progress, optimize_directions
from targetclip.recipes import RECIPES
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world

STEPS = 5
ROOM = 1 << 50
OnStep = Callable[[int, Progress], None]


class Died(BaseException):
    """The end of a worker, from a cause that nothing in it expects."""


@pytest.fixture(scope="session")
def teacher(tiny_world: Path) -> Teacher:
    scene = load_scene(load_world(str(tiny_world)), torch.device("cpu"))
    made = make_teacher(scene, "consistent", replace(RECIPES["consistent"], steps=STEPS), 2)
    return replace(made, bank=made.bank[:16])


def in_scene(teacher: Teacher, kind: type[Scene], **changes: Any) -> Teacher:
    """The teacher in a scene of a kind that observes or changes the search."""
    scene = teacher.scene
    parts = {name: getattr(scene, name) for name in Scene.__dataclass_fields__}
    return replace(teacher, scene=kind(**(parts | changes)))


def planned(work: Path, teacher: Teacher) -> Plan:
    """Five targets in three chunks; the work folder is the plan's parent."""
    sets = [open_targets("avataaars:5")]
    return make_plan(work, "planner", sets, {"seed": 0}, 2, teacher.prepare, lambda n, of: None)


@pytest.fixture
def plan(teacher: Teacher, tmp_path: Path) -> Plan:
    return planned(tmp_path, teacher)


def worker(plan: Plan, teacher: Teacher, owner: str = "first", **changes: Any) -> Worker:
    """A worker that neither saves nor prints."""
    usual: dict[str, Any] = {
        "stop": Stop(),
        "lease": 60.0,
        "checkpoint_seconds": 3600.0,
        "max_attempts": 3,
    }
    options = {**usual, **changes}
    made = Worker(work=plan.folder.parent, plan=plan, teacher=teacher, owner=owner, **options)
    for name in ("claims", "checkpoints", "chunks", "attempts"):
        (made.work / name).mkdir(exist_ok=True)
    return made


def chunk_rows(plan: Plan, chunk: int) -> list[dict[str, Any]]:
    table = read_chunk(plan.folder.parent / "chunks" / f"{chunk:06d}.parquet")[0]
    rows: list[dict[str, Any]] = table.drop_columns(["seconds"]).to_pylist()
    return rows


def seconds_of(plan: Plan, chunk: int) -> list[float]:
    table = read_chunk(plan.folder.parent / "chunks" / f"{chunk:06d}.parquet")[0]
    found: list[float] = table["seconds"].to_pylist()
    return found


def failures_of(plan: Plan, chunk: int) -> list[Failure]:
    return read_chunk(plan.folder.parent / "chunks" / f"{chunk:06d}.parquet")[1]


def names(plan: Plan, folder: str) -> list[str]:
    return sorted(os.listdir(plan.folder.parent / folder))


@pytest.fixture(scope="session")
def undisturbed(
    teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, Any]]]:
    """The rows of each chunk as one worker that nothing happens to publishes them."""
    plan = planned(tmp_path_factory.mktemp("undisturbed"), teacher)
    assert worker(plan, teacher).run(wait=True)
    return [chunk_rows(plan, chunk) for chunk in range(3)]


# What a worker publishes


def test_directions_are_what_the_optimizer_gives_for_the_same_targets_seeds_and_sources(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    targets = [target.picture for target in open_targets("avataaars:5")]  # type: ignore[union-attr]
    scene = teacher.scene
    embeddings = scene.embedder.embed_pictures(targets)
    for chunk, rows in enumerate(undisturbed):
        where = plan.rows(chunk)
        found = optimize_directions(
            scene.generator,
            scene.embedder,
            embeddings[where],
            teacher.bank,
            teacher.recipe,
            torch.zeros(len(rows), *teacher.bank.shape[1:]),
            [row["seed"] for row in rows],
            max_images=12,
        )
        for i, row in enumerate(rows):
            assert torch.equal(torch.tensor(row["direction"]), found.directions[i])
            assert torch.equal(torch.tensor(row["coefficients"]), found.coefficients[i])
            assert row["loss"] == float(found.loss[i])
            assert row["transfer"] == pytest.approx(1 - float(found.transfer[i]), abs=1e-6)
            assert row["consistency"] == pytest.approx(1 - float(found.consistency[i]), abs=1e-6)
            assert row["steps"] == STEPS and row["recipe"] == "consistent"
            own = embeddings[where][i]
            assert row["embedding"] == pytest.approx(F.normalize(own, dim=0).tolist(), abs=1e-6)
            assert row["norm"] == pytest.approx(float(own.norm()), rel=1e-6)
    ids = [row["id"] for rows in undisturbed for row in rows]
    assert ids == plan.targets["id"].to_pylist()
    assert [row["split"] for rows in undisturbed for row in rows] == [
        plan.splits()[target] for target in ids
    ]


def test_held_out_scores_are_cosines_of_sources_that_are_not_in_the_bank(
    teacher: Teacher, undisturbed: list[list[dict[str, Any]]]
) -> None:
    assert not torch.isin(teacher.held_out, teacher.bank).any()
    row = undisturbed[0][0]
    direction, target = torch.tensor(row["direction"]), torch.tensor(row["embedding"])

    def embed(ws: Tensor) -> Tensor:
        with torch.no_grad():
            images = teacher.scene.generator.synthesis(ws)
            return F.normalize(teacher.scene.embedder.embed_images(images, "consistent"), dim=-1)

    before, after = embed(teacher.held_out), embed(teacher.held_out + direction)
    assert row["held_out_before"] == pytest.approx(float((before @ target).mean()), abs=1e-5)
    assert row["held_out_transfer"] == pytest.approx(float((after @ target).mean()), abs=1e-5)
    moved = F.normalize(before - after, dim=-1)
    assert row["held_out_consistency"] == pytest.approx(float(moved[0] @ moved[1]), abs=1e-4)


def test_neither_the_order_nor_who_does_a_chunk_changes_a_pair(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    first, second = worker(plan, teacher), worker(plan, teacher, "second")
    assert second.try_chunk(2) and first.try_chunk(1) and second.try_chunk(0)
    assert [chunk_rows(plan, chunk) for chunk in range(3)] == undisturbed
    assert first.run(wait=False) and names(plan, "claims") == []


def test_a_target_that_is_not_finite_is_a_failure_and_its_neighbour_is_as_it_was(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    embeddings = np.array(plan.embeddings)
    embeddings[0] = np.nan
    embeddings[3] = 0
    broken = replace(plan, embeddings=embeddings)
    assert worker(broken, teacher).run(wait=True)
    rows = plan.targets.to_pylist()
    assert failures_of(plan, 0) == [
        Failure(rows[0]["id"], "avataaars:0", "optimize", "the loss of step 0 is not finite")
    ]
    assert [failure.id for failure in failures_of(plan, 1)] == [rows[3]["id"]]
    assert "embedding is zero" in failures_of(plan, 1)[0].reason
    for chunk, left in ((0, 1), (1, 0)):
        (row,) = chunk_rows(plan, chunk)
        known = undisturbed[chunk][left]
        assert row["id"] == known["id"]
        assert np.allclose(row["direction"], known["direction"], atol=1e-4)


def test_scores_that_are_not_finite_make_a_failure_of_that_target_alone(
    teacher: Teacher, plan: Plan
) -> None:
    class Overflowing(Scene):
        def search(self, *args: Any, **kwargs: Any) -> Optimized:
            result = super().search(*args, **kwargs)
            result.coefficients[1, 0] = torch.inf
            return result

    assert worker(plan, in_scene(teacher, Overflowing)).try_chunk(0)
    assert [row["origin"] for row in chunk_rows(plan, 0)] == ["avataaars:0"]
    assert [failure.origin for failure in failures_of(plan, 0)] == ["avataaars:1"]


@pytest.mark.parametrize("initial", ["random", "inversion"])
def test_directions_start_where_the_plan_says(
    teacher: Teacher, tmp_path: Path, initial: str
) -> None:
    # A learning rate of nothing leaves directions where they start.
    recipe = replace(teacher.recipe, initial=initial, steps=1, learning_rate=1e-30)  # type: ignore[arg-type]
    starting = replace(teacher, recipe=recipe)
    plan = planned(tmp_path, starting)
    assert plan.initial is not None and np.ptp(plan.initial, axis=0).max() > 0
    worker(plan, starting).try_chunk(1)
    directions = [row["direction"] for row in chunk_rows(plan, 1)]
    assert np.array_equal(np.array(directions, np.float32), plan.initial[2:4])


def test_images_are_rendered_a_step_at_a_time_or_fewer_where_asked(
    teacher: Teacher, plan: Plan
) -> None:
    rendered: list[int] = []

    class Counted:
        """A generator that counts the images that it renders at once."""

        def __getattr__(self, name: str) -> Any:
            return getattr(teacher.scene.generator, name)

        def synthesis(self, ws: Tensor) -> Tensor:
            rendered.append(len(ws))
            return teacher.scene.generator.synthesis(ws)

    for most in (None, 5):
        rendered.clear()
        counting = in_scene(teacher, Scene, generator=Counted(), max_images=most)
        counting.optimize_chunk(plan, 0, lambda progress: None, None)
        counting.held_out_scores(torch.ones(8, 32), torch.zeros(8, *teacher.bank.shape[1:]))
        assert max(rendered) == (most or 16)  # 8 targets by 2 sources; a step has 2 by 6
        assert min(rendered) <= (most or 12)


# Ends


def test_a_killed_chunk_goes_on_from_its_checkpoint_to_the_same_bits(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    steps: list[tuple[str, int]] = []

    def on_step(owner: str, last: int) -> OnStep:
        def record(chunk: int, progress: Progress) -> None:
            steps.append((owner, progress.step))
            if progress.step == last:
                raise Died

        return record

    with pytest.raises(Died):
        worker(plan, teacher, on_step=on_step("first", 3), checkpoint_seconds=1e-9).try_chunk(0)
    assert names(plan, "checkpoints") == ["000000.first.pt"] and names(plan, "chunks") == []
    assert worker(plan, teacher, "second", on_step=on_step("second", -1)).try_chunk(0)
    assert steps == [*(("first", i) for i in range(4)), ("second", 4)]
    assert chunk_rows(plan, 0) == undisturbed[0]
    assert names(plan, "checkpoints") == names(plan, "attempts") == names(plan, "claims") == []


def test_a_checkpoint_at_the_last_step_needs_only_to_be_published(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    def end(chunk: int, progress: Progress) -> None:
        if progress.step == STEPS - 1:
            raise Died

    with pytest.raises(Died):
        worker(plan, teacher, on_step=end, checkpoint_seconds=1e-9).try_chunk(0)
    steps: list[int] = []
    worker(plan, teacher, on_step=lambda chunk, progress: steps.append(progress.step)).try_chunk(0)
    assert steps == [] and chunk_rows(plan, 0) == undisturbed[0]


def test_the_time_of_a_chunk_is_that_of_all_its_workers_but_for_what_was_lost(
    teacher: Teacher, plan: Plan
) -> None:
    def end(chunk: int, progress: Progress) -> None:
        raise Died

    with pytest.raises(Died):
        worker(plan, teacher, on_step=end, checkpoint_seconds=1e-9).try_chunk(0)
    path = plan.folder.parent / "checkpoints" / "000000.first.pt"
    left = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    assert 0 < left["seconds"] < 100
    longer = io.BytesIO()
    torch.save({**left, "seconds": 1000.0}, longer)
    path.write_bytes(hashlib.sha256(longer.getvalue()).digest() + longer.getvalue())
    begun = time.monotonic()
    assert worker(plan, teacher).try_chunk(0)
    own = time.monotonic() - begun
    # Each target has its share of the two.
    assert seconds_of(plan, 0)[0] == seconds_of(plan, 0)[1]
    assert 1000 < sum(seconds_of(plan, 0)) < 1000 + own


def test_the_furthest_checkpoint_that_can_be_read_is_the_one_to_go_on_from(
    teacher: Teacher, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    def end_at(step: int) -> OnStep:
        def end(chunk: int, progress: Progress) -> None:
            if progress.step == step:
                raise Died

        return end

    checkpoints = plan.folder.parent / "checkpoints"
    checkpoints.mkdir()
    for owner, step in (("a", 2), ("b", 1)):
        with pytest.raises(Died):
            aside = [path.rename(path.with_suffix(".aside")) for path in checkpoints.iterdir()]
            worker(plan, teacher, owner, on_step=end_at(step), checkpoint_seconds=1e-9).try_chunk(0)
        for path in aside:
            path.rename(path.with_suffix(".pt"))
    content = (checkpoints / "000000.a.pt").read_bytes()
    (checkpoints / "000000.c.pt").write_bytes(content[: len(content) // 2])
    (checkpoints / "000000.d.pt").write_bytes(content.replace(b"step", b"stop"))
    steps: list[int] = []
    with caplog.at_level(logging.WARNING):
        worker(
            plan, teacher, on_step=lambda chunk, progress: steps.append(progress.step)
        ).try_chunk(0)
    assert steps == [3, 4]
    for name in ("000000.c.pt", "000000.d.pt"):
        assert f"{name}: not readable, left out: it is cut short or altered" in caplog.text


def test_a_chunk_that_always_ends_its_worker_is_given_up_and_the_others_are_built(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    begun: list[int] = []

    def end(chunk: int, progress: Progress) -> None:
        if chunk == 1:
            begun.append(chunk)
            raise Died

    for attempt in range(3):
        with pytest.raises(Died):
            worker(plan, teacher, f"worker {attempt}", on_step=end).run(wait=True)
    assert worker(plan, teacher, "last", on_step=end).run(wait=True)
    assert len(begun) == 3
    assert chunk_rows(plan, 1) == []
    rows = plan.targets.to_pylist()[2:4]
    reason = "its worker died 3 times without getting on"
    assert failures_of(plan, 1) == [
        Failure(row["id"], row["origin"], "optimize", reason) for row in rows
    ]
    assert chunk_rows(plan, 0) == undisturbed[0] and chunk_rows(plan, 2) == undisturbed[2]
    assert names(plan, "attempts") == []


def test_a_chunk_that_gets_on_is_not_given_up_however_often_its_worker_ends(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    def end(chunk: int, progress: Progress) -> None:
        raise Died

    for attempt in range(STEPS):
        left = worker(
            plan, teacher, str(attempt), on_step=end, checkpoint_seconds=1e-9, max_attempts=1
        )
        with pytest.raises(Died):
            left.try_chunk(0)
    assert worker(plan, teacher, max_attempts=1).try_chunk(0)
    assert chunk_rows(plan, 0) == undisturbed[0]


# Signals


class LateStop(Stop):
    """A signal that comes when it has been looked for so many times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else None


@pytest.mark.parametrize("looks", range(2, 6))
def test_a_signal_saves_a_checkpoint_whenever_it_comes_and_frees_the_chunk_at_once(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]], looks: int
) -> None:
    taken: list[int] = []
    with pytest.raises(Stopped):
        worker(
            plan,
            teacher,
            stop=LateStop(looks),
            on_step=lambda chunk, progress: taken.append(progress.step),
        ).run(wait=True)
    assert names(plan, "claims") == [] and len(names(plan, "checkpoints")) == 1
    steps: list[tuple[int, int]] = []
    assert worker(
        plan, teacher, "next", on_step=lambda chunk, progress: steps.append((chunk, progress.step))
    ).run(wait=True)
    # The step in which the signal came is saved, and not reported.
    assert len(steps) == 3 * STEPS - len(taken) - 1
    assert [chunk_rows(plan, chunk) for chunk in range(3)] == undisturbed


def test_a_signal_ends_the_wait_for_others(teacher: Teacher, plan: Plan) -> None:
    stop = Stop()
    made = worker(plan, teacher, stop=stop, lease=0.2)
    for chunk in range(3):
        assert create(made.work / "claims" / f"{chunk:06d}", "other")
        future = time.time() + 3600
        os.utime(made.work / "claims" / f"{chunk:06d}", (future, future))
    asked = threading.Timer(0.2, stop.ask, (signal.SIGTERM, None))
    asked.start()
    with pytest.raises(Stopped):
        made.run(wait=True)
    asked.join()
    assert names(plan, "chunks") == []


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_the_first_signal_asks_and_a_second_ctrl_c_ends(teacher: Teacher) -> None:
    for number in SIGNALS:
        stop = Stop()
        stop.listen()
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Stopped):
            stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# Others


def test_chunks_in_other_hands_are_left_to_them_or_waited_for_until_they_go_stale(
    teacher: Teacher, plan: Plan, undisturbed: list[list[dict[str, Any]]]
) -> None:
    made = worker(plan, teacher)
    held = made.work / "claims" / "000001"
    assert create(held, "other")
    assert made.run(wait=False) is False
    assert names(plan, "chunks") == ["000000.parquet", "000002.parquet"]
    assert names(plan, "claims") == ["000001"]
    os.utime(held, (1, 1))
    assert made.run(wait=True) is True
    assert [chunk_rows(plan, chunk) for chunk in range(3)] == undisturbed


def test_what_another_publishes_meanwhile_is_waited_for(teacher: Teacher, plan: Plan) -> None:
    made, other = worker(plan, teacher, lease=2.0), worker(plan, teacher, "other")
    claims = made.work / "claims"
    for chunk in range(3):
        assert create(claims / f"{chunk:06d}", "other")

    def finish() -> None:
        for chunk in range(3):
            other.give_up(chunk, "as the other found")

    later = threading.Timer(0.3, finish)
    later.start()
    assert made.run(wait=True) is True
    later.join()
    assert {failure.reason for failure in failures_of(plan, 2)} == {"as the other found"}


def test_work_on_a_chunk_ends_when_its_claim_is_lost_and_the_new_claim_is_left_alone(
    teacher: Teacher,
    plan: Plan,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps: list[int] = []
    held = plan.folder.parent / "claims" / "000000"

    def lose(chunk: int, progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 1:
            held.unlink()
            assert create(held, "other")
            time.sleep(1.0)  # a heartbeat notices

    with caplog.at_level(logging.WARNING):
        assert worker(plan, teacher, on_step=lose, lease=0.4).try_chunk(0)
    assert steps == [0, 1] and names(plan, "chunks") == []
    assert "chunk 000000: taken over by another worker" in caplog.text
    left = look(held)
    assert left is not None and left.owner == "other"


def test_the_first_to_publish_a_chunk_wins(
    teacher: Teacher, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    other = worker(plan, teacher, "other")

    def publish_elsewhere(chunk: int, progress: Progress) -> None:
        if progress.step == STEPS - 1:
            other.give_up(chunk, "the other was first")

    with caplog.at_level(logging.WARNING):
        assert worker(plan, teacher, on_step=publish_elsewhere).try_chunk(0)
    assert chunk_rows(plan, 0) == []
    assert {failure.reason for failure in failures_of(plan, 0)} == {"the other was first"}
    assert "another worker was first" in caplog.text
    assert names(plan, "attempts") == names(plan, "checkpoints") == []


# How many targets together


def tried(seconds: dict[int, float], steps: int = 10) -> tuple[int, list[int]]:
    """The size found where a step takes so long, and the sizes tried; others do not fit."""
    asked: list[int] = []

    def try_batch(size: int) -> float:
        asked.append(size)
        if size not in seconds:
            raise torch.OutOfMemoryError("no room")
        return seconds[size]

    return fitting_batch_size(try_batch, steps, lambda: (ROOM, 0, 0)), asked


def test_a_batch_grows_for_as_long_as_a_target_gets_cheaper_by_it() -> None:
    assert tried({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.1, 16: 6.2}) == (4, [1, 2, 4, 8])
    assert tried({1: 1.0, 2: 1.95}) == (1, [1, 2])
    assert tried({2**i: 1.0 for i in range(20)}, steps=1)[0] == MOST_TARGETS


def test_a_batch_is_the_last_one_that_fits() -> None:
    assert tried({1: 1.0, 2: 1.0, 4: 1.0}) == (4, [1, 2, 4, 8])
    with pytest.raises(ValueError, match=r"a step of one target, found too little.*--max-images"):
        tried({})


def test_another_error_than_memory_is_not_hidden() -> None:
    def try_batch(size: int) -> float:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        fitting_batch_size(try_batch, 1)


def test_a_chunk_does_not_last_longer_than_it_may() -> None:
    seconds = {2**i: 1.0 + 0.1 * 2**i for i in range(10)}
    assert tried(seconds, steps=150)[0] == 8  # 270 s; 16 would take 390
    assert tried(seconds, steps=10_000)[0] == 1  # one target is a chunk however long it takes


def test_a_batch_does_not_grow_into_memory_that_is_not_there() -> None:
    peak = 100

    def try_batch(size: int) -> float:
        nonlocal peak
        peak = 100 + 10 * size  # given back before anybody can look, but for the peak
        return 1.0

    # Four take 40; eight would take 80 of the 70 there are.
    assert fitting_batch_size(try_batch, 1, lambda: (70, 100, peak)) == 4


def test_the_peak_of_memory_is_known_after_it_was_given_back() -> None:
    _, _, before = memory()
    block = np.ones(max(50_000_000, before // 4), dtype=np.uint8)
    _, used, _ = memory()
    del block
    assert memory()[2] > max(before, used) - 5_000_000  # the two are counted apart


def test_a_step_is_timed_without_leaving_a_trace(teacher: Teacher) -> None:
    state = torch.get_rng_state()
    assert 0 < time_step(teacher, 3) < 60
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in teacher.scene.generator.parameters())  # type: ignore[attr-defined]
