"""Claims: held by the living, broken by one when their owner is gone."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import claims
from data.claims import Claim, claim, owner_name
from data.publish import At

ROOT = Path(__file__).parents[2]
LEASE = 100.0


def claimed(folder: Path, owner: str = "first", lease: float = LEASE) -> Claim:
    made = claim(folder, "00012", owner, lease)
    assert made is not None
    return made


def age(path: Path, seconds: float = 10 * LEASE) -> None:
    """Make a file look as if nobody had touched it for so long."""
    then = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def started(folder: Path, code: str) -> "subprocess.Popen[str]":
    head = "import time\nfrom pathlib import Path\nfrom data.claims import *\n"
    head += "from tests.proof.points import fault_at\n"
    head += f"folder = Path({str(folder)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# One holder


def test_what_is_claimed_is_not_claimed_again_until_released(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    assert first.path == tmp_path / "00012" and first.owner == "first"
    assert claim(tmp_path, "00012", "second", LEASE) is None
    assert claim(tmp_path, "00013", "second", LEASE) is not None
    first.release()
    assert claimed(tmp_path, "second").heartbeat()
    assert sorted(os.listdir(tmp_path)) == ["00012", "00013"]


def race(folder: Path) -> list[Claim]:
    barrier = threading.Barrier(12)
    made: list[Claim] = []

    def work(number: int) -> None:
        barrier.wait()
        found = claim(folder, "00012", f"racer {number}", LEASE)
        if found is not None:
            made.append(found)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


def test_of_many_threads_one_claims(tmp_path: Path) -> None:
    assert len(race(tmp_path)) == 1


@pytest.mark.parametrize("skew", [-600.0, 0.0, 600.0])
def test_a_live_claim_is_kept_and_a_stale_one_broken_whatever_this_hosts_clock(
    tmp_path: Path, skew: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + skew)
    first = claimed(tmp_path)
    age(first.path, LEASE / 2)
    assert claim(tmp_path, "00012", "second", LEASE) is None
    assert first.heartbeat()
    age(first.path, LEASE * 1.1)
    assert claimed(tmp_path, "second").heartbeat()


@pytest.mark.parametrize("ahead", [-600.0, 600.0])
def test_the_clock_is_the_file_systems(
    tmp_path: Path, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = claimed(tmp_path)
    clock_ns = claims.clock_ns
    monkeypatch.setattr(claims, "clock_ns", lambda folder: clock_ns(folder) + int(ahead * 1e9))
    second = claim(tmp_path, "00012", "second", LEASE)
    assert (second is not None) == (ahead > LEASE)
    assert first.heartbeat() == (second is None)


def test_a_heartbeat_makes_a_claim_young_again(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    age(first.path)
    assert first.heartbeat() and not first.lost
    assert claim(tmp_path, "00012", "second", LEASE) is None


@pytest.mark.parametrize("content", [b"", b'{"own', b"[]", b"\xff\xfe", b"{}"])
def test_a_claim_killed_while_it_was_written_holds_for_a_lease(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "00012"
    path.write_bytes(content)
    assert claim(tmp_path, "00012", "second", LEASE) is None
    age(path)
    assert claimed(tmp_path, "second").heartbeat()


# Breaking


def test_a_stale_claim_is_broken_by_exactly_one_of_many_threads(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    age(first.path)
    # Of two who are told yes in a rare race, one learns at its first heartbeat that it lost.
    assert len([made for made in race(tmp_path) if made.heartbeat()]) == 1
    assert not first.heartbeat()
    assert os.listdir(tmp_path) == ["00012"]


def test_an_owner_that_was_stopped_notices_and_leaves_anothers_claim_alone(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    age(first.path)
    second = claimed(tmp_path, "second")
    age(second.path, LEASE / 2)
    before = second.path.stat().st_ctime_ns
    assert first.heartbeat() is False and first.lost
    first.release()
    assert second.path.stat().st_ctime_ns == before  # not even moved away and back
    assert second.heartbeat() and not second.lost


def test_a_claim_that_is_gone_is_lost_and_released_without_complaint(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    first.path.unlink()
    assert first.heartbeat() is False and first.lost
    first.release()
    assert os.listdir(tmp_path) == []


def just_at(actions: dict[str, Callable[[], object]]) -> At:
    """Return an `at` that lets things happen when their points are reached first."""
    left = dict(actions)

    def at(point: str) -> None:
        left.pop(point, lambda: None)()

    return at


def test_a_claim_made_while_a_breaker_dozed_is_given_back(tmp_path: Path) -> None:
    age(claimed(tmp_path).path)
    made: list[Claim] = []
    at = just_at({"before-removal": lambda: made.append(claimed(tmp_path, "second"))})
    assert claim(tmp_path, "00012", "third", LEASE, at) is None
    assert made[0].heartbeat()
    assert os.listdir(tmp_path) == ["00012"]


def test_an_owner_that_wakes_while_it_is_being_broken_keeps_its_claim(tmp_path: Path) -> None:
    first = claimed(tmp_path)
    age(first.path)
    at = just_at({"before-removal": first.heartbeat})
    assert claim(tmp_path, "00012", "second", LEASE, at) is None
    assert first.heartbeat()


def test_a_claim_that_cannot_be_given_back_is_lost_to_the_one_in_its_place(tmp_path: Path) -> None:
    age(claimed(tmp_path).path)
    made: list[Claim] = []
    at = just_at(
        {
            "before-removal": lambda: made.append(claimed(tmp_path, "second")),
            "before-return": lambda: made.append(claimed(tmp_path, "fourth")),
        }
    )
    assert claim(tmp_path, "00012", "third", LEASE, at) is None
    assert [one.heartbeat() for one in made] == [False, True]
    assert os.listdir(tmp_path) == ["00012"]


def test_a_release_gives_back_the_claim_of_whoever_came_in_between(tmp_path: Path) -> None:
    made: list[Claim] = []
    at = just_at({"before-removal": lambda: made.append(claimed(tmp_path, "second"))})
    first = claim(tmp_path, "00012", "first", LEASE, at)
    assert first is not None
    age(first.path)
    first.release()
    assert made[0].heartbeat()


@pytest.mark.parametrize("point", ["before-look", "before-removal"])
def test_a_claim_released_or_broken_under_ones_eyes_is_no_error(tmp_path: Path, point: str) -> None:
    first = claimed(tmp_path)
    age(first.path)
    second = claim(tmp_path, "00012", "second", LEASE, just_at({point: first.release}))
    assert (second is not None and second.heartbeat()) == (point == "before-look")


def test_a_breaker_that_dozes_before_it_claims_gets_nothing(tmp_path: Path) -> None:
    age(claimed(tmp_path).path)
    made: list[Claim] = []
    at = just_at({"after-removal": lambda: made.append(claimed(tmp_path, "second"))})
    assert claim(tmp_path, "00012", "third", LEASE, at) is None
    assert made[0].heartbeat()
    assert os.listdir(tmp_path) == ["00012"]


# Heartbeats in the background


def test_there_are_four_heartbeats_a_lease(tmp_path: Path) -> None:
    waits: list[float | None] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return len(waits) > 3

    first = claimed(tmp_path)
    first.beat_until(Stop())
    assert waits == [LEASE / 4] * 4


def test_a_claim_is_kept_alive_until_the_end_of_the_block_and_then_not(tmp_path: Path) -> None:
    first = claimed(tmp_path, lease=0.2)

    def is_young() -> bool:
        return first.path.stat().st_mtime_ns > aged

    with first.kept_alive():
        for _ in range(2):
            age(first.path)
            aged = first.path.stat().st_mtime_ns
            wait_for(is_young)
    age(first.path)
    aged = first.path.stat().st_mtime_ns
    time.sleep(0.2)
    assert not is_young()
    assert first.path.exists() and not first.lost


def test_the_end_of_the_block_does_not_wait_for_a_heartbeat(tmp_path: Path) -> None:
    first = claimed(tmp_path, lease=3600)
    threads = threading.active_count()
    start = time.monotonic()
    with pytest.raises(KeyError), first.kept_alive():
        assert threading.active_count() == threads + 1
        raise KeyError
    assert time.monotonic() - start < 5
    assert threading.active_count() == threads


def test_heartbeats_go_on_after_a_file_system_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = claimed(tmp_path, lease=0.1)
    age(first.path)
    aged = first.path.stat().st_mtime_ns
    utime = os.utime
    failures: Iterator[OSError] = iter([OSError(errno.EIO, "broken"), PermissionError("no")])

    def fails_twice(descriptor: int) -> None:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        utime(descriptor)

    monkeypatch.setattr(os, "utime", fails_twice)
    with first.kept_alive():
        wait_for(lambda: first.path.stat().st_mtime_ns > aged)
    assert not first.lost
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_a_claim_lost_in_the_background_is_marked(tmp_path: Path) -> None:
    first = claimed(tmp_path, lease=0.1)
    with first.kept_alive():
        first.path.write_text('{"owner": "second"}')
        wait_for(lambda: first.lost)
    assert first.path.exists()


# Kills and halts


@pytest.mark.parametrize("point", ["after-claim", "before-release"])
def test_the_claim_of_a_killed_owner_can_be_broken_after_a_lease(
    tmp_path: Path, point: str
) -> None:
    code = f"claim(folder, '00012', 'first', 100, fault_at({point!r}, 1)).release()"
    process = started(tmp_path, code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert claim(tmp_path, "00012", "second", LEASE) is None
    age(tmp_path / "00012")
    assert claimed(tmp_path, "second").heartbeat()


def test_a_process_stopped_for_longer_than_a_lease_loses_its_claim(tmp_path: Path) -> None:
    code = """
made = claim(folder, "00012", "first", 0.4)
with made.kept_alive():
    print("claimed", flush=True)
    while not made.lost:
        time.sleep(0.01)
made.release()
print("lost")
"""
    process = started(tmp_path, code)
    assert process.stdout is not None and process.stdout.readline() == "claimed\n"
    process.send_signal(signal.SIGSTOP)
    made: list[Claim | None] = [None]
    try:
        os.waitpid(process.pid, os.WUNTRACED)

        def broken() -> bool:
            made[0] = claim(tmp_path, "00012", "second", 0.4)
            return made[0] is not None

        wait_for(broken)
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == "lost\n"
    assert made[0] is not None and made[0].heartbeat()


# What is refused


@pytest.mark.parametrize("lease", [0.0, -1.0, float("nan")])
def test_a_lease_of_nothing_is_refused(tmp_path: Path, lease: float) -> None:
    with pytest.raises(ValueError, match="above 0 seconds"):
        claim(tmp_path, "00012", "first", lease)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        claim(tmp_path / "missing", "00012", "first", LEASE)


def test_a_full_disk_leaves_no_claim_and_says_what_to_do(tmp_path: Path) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
try:
    claim(folder, "00012", "first", 100)
except OSError as error:
    print(error.errno, error.strerror)
"""
    output = started(tmp_path, code).communicate()[0]
    assert output.startswith(f"{errno.EFBIG} ") and len(output.splitlines()) == 1
    assert str(tmp_path / "00012") in output and "free some space" in output
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="00012"):
            claim(tmp_path, "00012", "first", LEASE)
    finally:
        tmp_path.chmod(0o700)


def test_an_owners_name_is_its_own_and_fits_a_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert owner_name() != owner_name()
    monkeypatch.setattr(socket, "gethostname", lambda: "node 7/ö.example.org" + "x" * 300)
    name = owner_name()
    assert re.fullmatch(rf"node-7---example-orgx+-{os.getpid()}-[0-9a-f]{{8}}", name)
    assert len(name) < 100
