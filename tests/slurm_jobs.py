"""The job scripts of examples/cluster on this machine, with stand-ins for Slurm's own commands."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# srun drops its options, and says which process it becomes; scontrol says what it was told.
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$JOB/task"; exec "$@"',
    "scontrol": 'echo "$@" >> "$JOB/told"',
}
ID = str(os.getpid())  # other tests may run on this machine, and a port follows from it
SLURM = {
    "SLURM_JOB_ID": ID,
    "SLURM_ARRAY_JOB_ID": ID,
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_GPUS_ON_NODE": "2",
}


def start(
    script: str, flags: Iterable[object], job: Path, commands: dict[str, str] = STAND_INS
) -> subprocess.Popen[str]:
    """Start a job script of examples/cluster as Slurm does, on processors.

    Args:
        job: folder of what the stand-ins say.
        commands: bodies of the commands that stand before all others, by their names.
    """
    job.mkdir(exist_ok=True)
    for name, body in commands.items():
        (job / name).write_text(f"#!/bin/bash\n{body}\n")
        (job / name).chmod(0o755)
    path = os.pathsep.join([str(job), str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {"PATH": path, "JOB": str(job), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", str(ROOT / "examples/cluster" / script), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **SLURM, **here},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(true: Callable[[], object], job: subprocess.Popen[str]) -> None:
    """Wait until something is so, while a job runs."""
    while not true():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
