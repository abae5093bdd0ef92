"""The job files of examples/cluster: Slurm scripts with stand-ins, and the fields of the others.

`tests/data/test_build.py` and `tests/train/test_mapper.py` run the Slurm scripts with real work.
"""

import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import slurm_jobs
import yaml

from data.build import Config
from targetclip.command import parse

FOLDER = slurm_jobs.ROOT / "examples/cluster"
WORK = {"build.slurm": "srun", "train.slurm": "accelerate"}


@pytest.mark.parametrize("name", ["build.slurm", "build-job.yaml", "build.sky.yaml"])
def test_the_two_lines_that_matter_are_the_same_everywhere(name: str) -> None:
    text = re.sub(r"\\\n#?", " ", (FOLDER / name).read_text())
    text = text.replace("sbatch examples/cluster/build.slurm", "python -m data.build")
    assert "pip install -e .\n" in text
    [line] = re.findall(r"python -m data\.build (--out .*)", text)
    config: Config = parse(Config, "build", None, shlex.split(line))
    shared = (str(config.out), *config.targets, config.world, config.precision)
    assert shared == ("/shared/pairs", "/shared/ffhq", "/shared/ffhq.toml", "bf16")


# Slurm


@pytest.mark.parametrize("script", WORK)
@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_that_was_not_stopped_ends_as_its_work_did(
    script: str, code: int, tmp_path: Path
) -> None:
    commands = {**slurm_jobs.STAND_INS, WORK[script]: f'echo "$@"; exit {code}'}
    job = slurm_jobs.start(script, ["--out", "with space"], tmp_path, commands)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code and "--out with space" in output
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143)])
def test_a_slurm_job_of_one_process_ends_it_and_is_requeued_unless_cancelled(
    number: int, code: int, tmp_path: Path
) -> None:
    waits = 'trap "rm $JOB/waits; exit 143" TERM; touch $JOB/waits; while true; do sleep 0.1; done'
    commands = {**slurm_jobs.STAND_INS, "accelerate": waits}
    job = slurm_jobs.start("train.slurm", [], tmp_path, commands)
    slurm_jobs.wait_until((tmp_path / "waits").exists, job)
    job.send_signal(number)
    job.communicate(timeout=60)  # until all its processes have closed their output
    assert job.returncode == code and not (tmp_path / "waits").exists()
    assert (tmp_path / "told").exists() == (number == signal.SIGUSR1)


@pytest.mark.parametrize(("script", "to"), [("build.slurm", "TERM@"), ("train.slurm", "B:USR1@")])
def test_slurm_signals_those_who_listen_before_the_time_is_up(script: str, to: str) -> None:
    text = (FOLDER / script).read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.M))
    assert options["signal"].removeprefix(to).isdigit() and "requeue" in options
    assert options["nodes"] == "1" and options["open-mode"] == "append"
    assert ("array" in options) == (script == "build.slurm")


# Kubernetes

# What batch/v1 has of a Job, as far as it is used here: a misspelt field is refused.
JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "backoffLimitPerIndex": int,
        "podFailurePolicy": {
            "rules": [{"action": str, "onPodConditions": [{"type": str, "status": str}]}]
        },
        "template": {
            "spec": {
                "restartPolicy": str,
                "terminationGracePeriodSeconds": int,
                "containers": [
                    {
                        "name": str,
                        "image": str,
                        "workingDir": str,
                        "command": [str],
                        "args": [str],
                        "resources": {
                            "requests": {"cpu": int, "memory": str},
                            "limits": {"nvidia.com/gpu": int},
                        },
                        "volumeMounts": [{"name": str, "mountPath": str}],
                    }
                ],
                "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
            }
        },
    },
}


def check(value: Any, schema: Any, path: str = "") -> None:
    """Check that a value has exactly the fields of a schema, each of its type."""
    if isinstance(schema, dict):
        assert value.keys() == schema.keys(), path
        for name, inner in schema.items():
            check(value[name], inner, f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for item in value:
            check(item, schema[0], path)
    else:
        assert type(value) is schema, path


def test_the_kubernetes_job_replaces_each_of_its_pods_alone() -> None:
    job = yaml.safe_load((FOLDER / "build-job.yaml").read_text())
    check(job, JOB)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    # The API's own conditions of backoffLimitPerIndex and of podFailurePolicy
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert spec["completions"] == spec["parallelism"] > 1
    [rule], [container] = spec["podFailurePolicy"]["rules"], pod["containers"]
    assert rule["action"] == "Ignore" and rule["onPodConditions"][0]["type"] == "DisruptionTarget"
    mounted = [mount["name"] for mount in container["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pod["volumes"]]
    assert container["command"] == ["bash", "-ec"] and "exec python" in container["args"][0]


# SkyPilot


def test_the_skypilot_task_is_for_one_spot_machine_that_comes_back() -> None:
    task = yaml.safe_load((FOLDER / "build.sky.yaml").read_text())
    assert task.keys() == {"name", "workdir", "resources", "envs", "setup", "run"}
    assert task["resources"]["use_spot"] is True and task["resources"]["job_recovery"]
    assert task["envs"] == {"SHARED": None}  # must be given
    assert "pip install" in task["setup"] and "python -m data.build" in task["run"]
