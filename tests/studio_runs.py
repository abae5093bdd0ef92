"""A studio in a process of its own, as `targetclip studio` starts it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def studio(temporary: Path, *arguments: object) -> Iterator[str]:
    """Serve a studio on a free port; the value is its address. It is ended by Ctrl-C, and must then
    say so and exit with 0.

    Args:
        temporary: the folder for temporary files.
        arguments: of the command.
    """
    command = [sys.executable, "-m", "predictor.cli", "studio", "--port", "0", "--no-browser"]
    command += ["--device", "cpu", *map(str, arguments)]
    log = temporary / "stderr"
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
            # A suite in the background ignores Ctrl-C, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process,
    ):
        assert process.stdout is not None
        said = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        if said is None:
            process.wait()
            raise AssertionError(log.read_text())
        try:
            yield said[0]
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert "the studio has ended" in log.read_text()
