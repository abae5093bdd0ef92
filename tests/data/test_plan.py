"""The plan of a build: made once, gone on with after an end, and never mixed with another."""

import hashlib
import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builds_made import pictures
from torch import Tensor

from data import plan as module
from data.plan import Plan, PlanTaken, check_plan, check_settings, check_targets, load_plan
from data.targets import BadTarget, Target, TargetSet, draw_avatar, open_targets, split_of
from targetclip.seeds import seed_of

SETTINGS = {"recipe_name": "consistent", "recipe": {"steps": 3, "initial": "zero"}, "seed": 4}


class Ended(BaseException):
    """A kill, as far as anything in the process can notice it."""


def embed(targets: list[Target], seeds: list[int]) -> tuple[Tensor, Tensor | None]:
    """Three numbers that tell pictures apart."""
    values = [hashlib.sha256(target.picture.tobytes()).digest()[:3] for target in targets]
    return torch.tensor([list(value) for value in values], dtype=torch.float32), None


def go_on(done: int, total: int) -> None:
    """An on_batch that never stops."""


def planned(
    work: Path,
    sets: list[TargetSet],
    owner: str = "first",
    on_batch: Callable[[int, int], None] = go_on,
    prepare: module.Prepare = embed,
    settings: dict[str, Any] = SETTINGS,
    batch_size: int = 2,
    **more: Any,
) -> Plan:
    """A plan made of two pictures at once."""
    work.mkdir(exist_ok=True)
    return module.make_plan(
        work, owner, sets, settings, batch_size, prepare, on_batch, pictures=2, **more
    )


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (*module.PARTS, module.RECORD)}


def drafts(work: Path) -> list[str]:
    return sorted(path.name for path in work.glob("draft.*"))


class Counted:
    """Drawn targets that count how often each is drawn."""

    def __init__(self, count: int) -> None:
        self.inner = open_targets(f"avataaars:{count}")
        self.spec = self.inner.spec
        self.drawn: list[str] = []

    def identity(self) -> str:
        return self.inner.identity()

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Target | BadTarget]:
        return self.starting_at(0)

    def starting_at(self, start: int) -> Iterator[Target | BadTarget]:
        for found in self.inner.starting_at(start):
            self.drawn.append(found.origin)
            yield found


# What is in it


def test_a_plan_holds_every_target_once_in_order_with_what_a_worker_needs(tmp_path: Path) -> None:
    sets = [open_targets("avataaars:3"), open_targets(str(pictures(tmp_path / "faces")))]
    plan = planned(tmp_path / "work", sets)
    rows = plan.targets.to_pylist()
    assert [row["origin"] for row in rows] == [
        *("avataaars:0", "avataaars:1", "avataaars:2"),
        *("faces/a.png", "faces/b.png"),
    ]
    targets = [found for found in sets[0] if isinstance(found, Target)]
    assert [row["id"] for row in rows[:3]] == [target.id for target in targets]
    for row in rows:
        assert row["split"] == split_of(row["id"])
        assert row["seed"] == seed_of("target", 4, row["id"])
    assert np.array_equal(plan.embeddings[:3], embed(targets, [0] * 3)[0].numpy())
    assert plan.initial is None
    assert plan.chunks == 3 and [plan.rows(i) for i in range(3)] == [
        *(slice(0, 2), slice(2, 4), slice(4, 5))
    ]
    assert plan.splits() == {row["id"]: row["split"] for row in rows}
    assert check_plan(plan.folder) == []


def test_pictures_that_cannot_be_read_and_duplicates_are_failures_with_their_reason(
    tmp_path: Path,
) -> None:
    folder = str(pictures(tmp_path / "faces"))
    plan = planned(tmp_path / "work", [open_targets(folder), open_targets(folder)])
    assert [(f.id, f.origin, f.stage) for f in plan.failures] == [
        ("", f"faces/{name}", "decode")
        for name in ("broken.png", "copy-of-a.png", "a.png", "b.png", "broken.png", "copy-of-a.png")
    ]
    reasons = [failure.reason for failure in plan.failures]
    assert "not a picture" in reasons[0] and str(tmp_path) not in reasons[0]
    assert reasons[1] == reasons[2] == "duplicate of faces/a.png"
    assert reasons[3] == "duplicate of faces/b.png"


def test_starts_of_directions_are_kept_where_a_recipe_has_them(tmp_path: Path) -> None:
    def prepare(targets: list[Target], seeds: list[int]) -> tuple[Tensor, Tensor]:
        starts = [torch.full((2, 3), float(seed % 97)) for seed in seeds]
        return embed(targets, seeds)[0], torch.stack(starts)

    plan = planned(tmp_path, [open_targets("avataaars:3")], prepare=prepare)
    assert plan.initial is not None and plan.initial.shape == (3, 2, 3)
    seeds = plan.targets["seed"].to_pylist()
    assert plan.initial[:, 0, 0].tolist() == [float(seed % 97) for seed in seeds]


def test_a_plan_does_not_tell_where_on_this_machine_a_folder_is(tmp_path: Path) -> None:
    sets = [open_targets(f"{pictures(tmp_path / 'faces')}/"), open_targets("avataaars:1")]
    plan = planned(tmp_path / "work", sets)
    assert [targets["spec"] for targets in plan.settings["targets"]] == ["faces", "avataaars:1"]
    for name, text in content(plan.folder).items():
        assert str(tmp_path).encode() not in text, name


def test_candidates_without_a_single_target_are_an_error_that_tells_where_the_reasons_are(
    tmp_path: Path,
) -> None:
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "broken.png").write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no target among 1 candidates; see '.*'") as caught:
            planned(tmp_path / "work", [open_targets(str(tmp_path / "faces"))])
        reasons = Path(str(caught.value).split("'")[1])
        assert "not a picture" in reasons.read_text()
        shutil.rmtree(reasons.parent)


# Going on


def test_a_stopped_plan_goes_on_without_decoding_again(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 7
        if done == 4:
            raise RuntimeError("stopped")

    targets = Counted(7)
    with pytest.raises(RuntimeError, match="stopped"):
        planned(tmp_path / "work", [targets], on_batch=stop)
    assert len(targets.drawn) == 4
    taken: list[int] = []
    plan = planned(
        tmp_path / "work", [targets], "second", on_batch=lambda done, total: taken.append(done)
    )
    assert targets.drawn == [f"avataaars:{i}" for i in range(7)]
    assert taken == [6, 7]
    undisturbed = planned(tmp_path / "other", [Counted(7)])
    assert content(plan.folder) == content(undisturbed.folder)


def test_a_killed_plan_goes_on_from_what_was_saved_and_forgets_what_came_after(
    tmp_path: Path,
) -> None:
    def end(done: int, total: int) -> None:
        if done == 6:
            raise Ended

    targets = Counted(7)
    with pytest.raises(Ended):
        planned(tmp_path / "work", [targets], on_batch=end, save_seconds=0.0)
    # The third batch reached the files, as it may, and not the record of what counts.
    lines = (tmp_path / "work" / "draft.first" / module.TARGETS).read_text().splitlines()
    record = json.loads((tmp_path / "work" / "draft.first" / "draft.json").read_text())
    assert (len(lines), record["taken"]) == (6, 4)
    plan = planned(tmp_path / "work", [targets], "second")
    assert targets.drawn == [f"avataaars:{i}" for i in (0, 1, 2, 3, 4, 5, 4, 5, 6)]
    undisturbed = planned(tmp_path / "other", [Counted(7)])
    assert content(plan.folder) == content(undisturbed.folder)


def test_a_duplicate_is_known_after_going_on(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    folder = str(pictures(tmp_path / "faces"))
    with pytest.raises(RuntimeError, match="stopped"):
        planned(tmp_path / "work", [open_targets(folder)], on_batch=stop)
    plan = planned(tmp_path / "work", [open_targets(folder)], "second")
    assert plan.targets["origin"].to_pylist() == ["faces/a.png", "faces/b.png"]
    assert plan.failures[-1].reason == "duplicate of faces/a.png"


def test_a_draft_of_other_settings_is_not_gone_on_with_and_does_not_stay(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    targets = Counted(4)
    for owner, seed in (("first", 4), ("second", 5), ("third", 6)):
        with pytest.raises(RuntimeError, match="stopped"):
            settings = {**SETTINGS, "seed": seed}
            planned(tmp_path, [targets], owner, on_batch=stop, settings=settings)
        assert drafts(tmp_path) == [f"draft.{owner}"]
    assert targets.drawn == ["avataaars:0", "avataaars:1"] * 3
    plan = planned(tmp_path, [targets], "fourth")
    assert plan.settings["seed"] == 4 and plan.targets["origin"].to_pylist() == [
        *("avataaars:0", "avataaars:1", "avataaars:2", "avataaars:3")
    ]
    assert drafts(tmp_path) == []


# Two who plan at once


def test_who_was_only_halted_finds_itself_replaced_by_a_plan_that_was_finished(
    tmp_path: Path,
) -> None:
    plans: list[Plan] = []

    def finish_elsewhere(done: int, total: int) -> None:
        if not plans:
            plans.append(planned(tmp_path, [Counted(4)], "second", batch_size=3))

    with pytest.raises(PlanTaken):
        planned(tmp_path, [Counted(4)], on_batch=finish_elsewhere)
    assert load_plan(tmp_path / "plan").batch_size == 3
    assert drafts(tmp_path) == [] and check_plan(tmp_path / "plan") == []


def test_who_was_only_halted_finds_itself_replaced_by_one_who_goes_on_with_its_work(
    tmp_path: Path,
) -> None:
    def take_over(done: int, total: int) -> None:
        def stop(done: int, total: int) -> None:
            raise RuntimeError("stopped")

        if done == 2:
            with pytest.raises(RuntimeError, match="stopped"):
                planned(tmp_path, [Counted(6)], "second", on_batch=stop)

    with pytest.raises(PlanTaken):
        planned(tmp_path, [Counted(6)], on_batch=take_over)
    assert drafts(tmp_path) == ["draft.second"]


def test_the_first_plan_stays_and_is_what_the_second_planner_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "remove_drafts", lambda work, but: None)
    plans: list[Plan] = []

    def finish_elsewhere(done: int, total: int) -> None:
        if not plans:
            plans.append(planned(tmp_path, [Counted(4)], "second", batch_size=3))

    late = planned(tmp_path, [Counted(4)], on_batch=finish_elsewhere, batch_size=4)
    assert late.batch_size == 3
    assert content(late.folder) == content(plans[0].folder)


# Nothing else is mixed in


def test_the_first_settings_that_are_not_as_planned_are_named() -> None:
    found = {**SETTINGS, "recipe": {"steps": 5, "initial": "zero"}}
    with pytest.raises(ValueError, match=r"^'out' .*\(recipe.steps: planned 3, found 5\)"):
        check_settings(Path("out"), SETTINGS, found)
    found = {"recipe_name": "paper", "recipe": {"initial": "random", "patience": 1}, "seed": 4}
    with pytest.raises(ValueError) as caught:
        check_settings(Path("out"), SETTINGS, found)
    named = re.findall(r"([\w.]+): planned", str(caught.value))
    assert named == ["recipe_name", "recipe.steps", "recipe.initial"]
    check_settings(Path("out"), SETTINGS, json.loads(json.dumps(SETTINGS)))


def changed(path: Path) -> None:
    draw_avatar("avataaars", 8, 0).save(path)


def test_other_targets_are_refused_and_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "faces")
    plan = planned(tmp_path / "work", [open_targets("avataaars:2"), open_targets(str(folder))])

    def check(*specs: str) -> None:
        check_targets(plan, [open_targets(spec) for spec in specs])

    check("avataaars:2", str(folder))
    with pytest.raises(
        ValueError, match=r"target set 0.spec: planned 'avataaars:2', found 'avataaars:3'"
    ):
        check("avataaars:3", str(folder))
    with pytest.raises(ValueError, match=r"target set 1.spec: planned 'faces', found None"):
        check("avataaars:2")
    with pytest.raises(ValueError, match=r"target set 2.spec: planned None, found 'styles:1'"):
        check("avataaars:2", str(folder), "styles:1")
    changed(folder / "b.png")
    with pytest.raises(ValueError, match=r"\(target set 1.identity: planned '\w+', found '\w+'\)"):
        check("avataaars:2", str(folder))


def test_an_added_picture_is_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "faces")
    plan = planned(tmp_path / "work", [open_targets(str(folder))])
    changed(folder / "c.png")
    with pytest.raises(ValueError, match=r"target set 0.count: planned 4, found 5"):
        check_targets(plan, [open_targets(str(folder))])


def test_a_folder_that_was_touched_or_copied_and_holds_the_same_is_accepted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "faces")
    plan = planned(tmp_path / "work", [open_targets(str(folder))])
    os.utime(folder / "a.png", (1, 1))
    check_targets(plan, [open_targets(str(folder))])
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "faces")
    check_targets(plan, [open_targets(str(copy))])


def test_a_folder_that_looks_as_it_did_is_not_read_again(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "faces")
    plan = planned(tmp_path / "work", [open_targets(str(folder))])
    picture = folder / "a.png"
    before = picture.stat()
    # Other bytes, of the same size and time: only a reader notices.
    picture.write_bytes(bytes(before.st_size))
    os.utime(picture, ns=(before.st_mtime_ns, before.st_mtime_ns))
    check_targets(plan, [open_targets(str(folder))])
    os.utime(picture, (1, 1))
    with pytest.raises(ValueError, match=r"target set 0.identity"):
        check_targets(plan, [open_targets(str(folder))])


def test_a_picture_that_changes_while_it_is_planned_is_noticed_later(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "faces")
    plan = planned(
        tmp_path / "work",
        [open_targets(str(folder))],
        on_batch=lambda done, total: changed(folder / "b.png"),
    )
    with pytest.raises(ValueError, match=r"target set 0.identity"):
        check_targets(plan, [open_targets(str(folder))])


# Damage


def test_a_missing_or_truncated_plan_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no plan at '.*plan'"):
        load_plan(tmp_path / "plan")
    plan = planned(tmp_path, [open_targets("avataaars:2")])
    os.truncate(plan.folder / module.EMBEDDINGS, 20)
    with pytest.raises(ValueError, match=r"embeddings.f32': expected 24 bytes, found 20"):
        load_plan(plan.folder)
    (plan.folder / module.EMBEDDINGS).unlink()
    with pytest.raises(ValueError, match=r"embeddings.f32': expected 24 bytes, found None"):
        load_plan(plan.folder)
    (plan.folder / module.RECORD).write_text("{}")
    with pytest.raises(ValueError, match="format targetclip-plan/1, found None"):
        load_plan(plan.folder)


def test_an_altered_plan_is_found_by_its_hash(tmp_path: Path) -> None:
    plan = planned(tmp_path, [open_targets("avataaars:2")])
    damaged = bytearray((plan.folder / module.EMBEDDINGS).read_bytes())
    damaged[5] ^= 1
    (plan.folder / module.EMBEDDINGS).write_bytes(damaged)
    assert check_plan(plan.folder) == ["embeddings.f32: altered since it was planned"]


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    def prepare(targets: list[Target], seeds: list[int]) -> tuple[Tensor, None]:
        return torch.zeros(len(targets), 100_000), None

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(OSError, match="free some space and run the same command again"):
            planned(tmp_path, [open_targets("avataaars:2")], prepare=prepare)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert planned(tmp_path, [open_targets("avataaars:2")], "second").targets.num_rows == 2
