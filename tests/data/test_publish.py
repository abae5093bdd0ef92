"""Files that appear whole or not at all: under kills, races and full disks."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from data.publish import publish_file, replace_file, sha256_of
from targetclip.command import write_file

ROOT = Path(__file__).parents[2]
OLD, NEW = b"old" * 1000, b"new" * 1000
Write = Callable[[Path, bytes], object]


HEAD = """
from pathlib import Path
from data.publish import *
from targetclip.command import write_file
from tests.proof.points import fault_at
"""


def started(code: str, preexec_fn: Callable[[], None] | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def is_killed(process: "subprocess.Popen[str]") -> bool:
    process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# Whole or not at all


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (OLD, NEW, b""):
        write_file(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_a_published_file_is_not_published_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert publish_file(path, OLD) is True
    before = path.stat()
    assert publish_file(path, NEW) is False
    after = path.stat()  # before it is read, which changes its time of access
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["file"]


def test_even_a_link_to_nowhere_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.symlink_to(tmp_path / "nowhere")
    assert publish_file(path, NEW) is False
    assert path.is_symlink() and not path.exists()


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([i]) * 300_000 for i in range(4)]
    write_file(path, contents[0])
    done = threading.Event()
    read_contents = set()

    def read() -> None:
        while not done.is_set():
            read_contents.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(40):
        write_file(path, contents[i % 4])
    done.set()
    reader.join()
    assert read_contents <= set(contents)


@pytest.mark.parametrize("write", [write_file, publish_file])
def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    synced = []

    def fsync(descriptor: int) -> None:
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((Path(target) == tmp_path, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write(path, NEW)
    assert synced == [(False, False), (True, True)]


def test_the_loser_too_makes_the_winners_name_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    publish_file(tmp_path / "file", OLD)
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
    )
    publish_file(tmp_path / "file", NEW)
    assert synced[-1] == tmp_path


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    codes = [errno.EINVAL]

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(codes[-1], os.strerror(codes[-1]))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    assert publish_file(tmp_path / "file", NEW)
    codes.append(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_file(tmp_path / "file", NEW)


# Kills and halts


@pytest.mark.parametrize("point", ["before-write", "after-write"])
def test_killed_before_the_name_the_old_file_stays(tmp_path: Path, point: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    process = started(f"replace_file(Path({str(path)!r}), {NEW!r}, fault_at({point!r}, 1))")
    assert is_killed(process)
    assert path.read_bytes() == OLD and visible(tmp_path) == ["file"]
    replace_file(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize(
    ("point", "published"), [("before-write", False), ("after-write", False), ("after-link", True)]
)
def test_killed_at_any_point_a_file_is_whole_or_absent(
    tmp_path: Path, point: str, published: bool
) -> None:
    path = tmp_path / "file"
    process = started(f"publish_file(Path({str(path)!r}), {OLD!r}, fault_at({point!r}, 1))")
    assert is_killed(process)
    assert visible(tmp_path) == (["file"] if published else [])
    assert publish_file(path, NEW) is not published
    assert path.read_bytes() == (OLD if published else NEW)


def test_a_writer_that_was_stopped_loses_to_the_one_that_went_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    at = "fault_at('after-write', 1, 'stop')"
    process = started(f"print(publish_file(Path({str(path)!r}), {OLD!r}, {at}))")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    try:
        assert publish_file(path, NEW) is True
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.communicate()[0] == "False\n"
    assert path.read_bytes() == NEW and os.listdir(tmp_path) == ["file"]


def test_the_fault_comes_at_the_call_it_names(tmp_path: Path) -> None:
    code = f"""
at = fault_at('after-link', 3)
for i in range(5):
    publish_file(Path({str(tmp_path)!r}) / str(i), b'x', at)
"""
    assert is_killed(started(code))
    assert visible(tmp_path) == ["0", "1", "2"]


# Races


def test_of_many_threads_the_first_wins(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    won: list[tuple[int, int]] = []

    def work(number: int) -> None:
        for name in range(10):
            barrier.wait()
            if publish_file(tmp_path / str(name), f"by {number}".encode()):
                won.append((name, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for name, _ in won) == list(range(10))
    for name, number in won:
        assert (tmp_path / str(name)).read_text() == f"by {number}"
    assert len(os.listdir(tmp_path)) == 10


def test_of_many_processes_the_first_wins(tmp_path: Path) -> None:
    code = f"""
print("ready", flush=True)
number = input()
for name in range(30):
    if publish_file(Path({str(tmp_path)!r}) / str(name), number.encode()):
        print(name)
"""
    processes = [started(code) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number, process in enumerate(processes):
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
    won = [process.communicate()[0].split() for process in processes]
    assert sorted(int(name) for names in won for name in names) == list(range(30))
    for number, names in enumerate(won):
        assert all((tmp_path / name).read_text() == str(number) for name in names)
    assert len(os.listdir(tmp_path)) == 30


def test_a_link_whose_answer_was_lost_is_known_as_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    assert publish_file(tmp_path / "file", NEW) is True
    assert publish_file(tmp_path / "file", OLD) is False
    assert (tmp_path / "file").read_bytes() == NEW


# What the file system refuses


@pytest.mark.parametrize("write", ["replace_file", "publish_file"])
def test_a_full_disk_says_what_to_do_and_leaves_nothing(tmp_path: Path, write: str) -> None:
    path = tmp_path / "file"
    if write == "replace_file":
        path.write_bytes(OLD)
    code = f"""
try:
    {write}(Path({str(path)!r}), bytes(100_000))
except OSError as error:
    print(error.errno, error.strerror)
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    output, errors = started(code, preexec_fn=limit).communicate()
    assert not errors and len(output.splitlines()) == 1
    assert output.startswith(f"{errno.EFBIG} ")
    assert str(path) in output and "100000 bytes" in output
    assert "free some space and run the same command again; nothing finished is lost" in output
    if write == "replace_file":
        assert path.read_bytes() == OLD
        path.unlink()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [write_file, publish_file])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_only_when_synced_leaves_nothing_too(
    tmp_path: Path, write: Write, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        write(tmp_path / "file", NEW)
    assert caught.value.errno == code
    assert ("free some space" in str(caught.value)) == (code != errno.EIO)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "file"
    with pytest.raises(OSError, match="hard links") as caught:
        publish_file(path, NEW)
    assert caught.value.errno == code
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("write", [write_file, publish_file])
def test_a_missing_folder_is_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(FileNotFoundError, match="create it first") as caught:
        write(tmp_path / "missing" / "file", NEW)
    assert str(tmp_path / "missing") in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("write", [write_file, publish_file])
def test_a_read_only_folder_is_an_error_that_names_it(tmp_path: Path, write: Write) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="file"):
            write(tmp_path / "file", NEW)
    finally:
        tmp_path.chmod(0o700)


def test_the_sum_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", os.urandom(1_000_003)):
        path.write_bytes(content)
        assert sha256_of(path) == hashlib.sha256(content).hexdigest()
