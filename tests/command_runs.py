"""Runs of the `targetclip` command in the process of a test, and which other commands there are."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from predictor import cli
from predictor.cli.flags import (
    EditFlags,
    MachineFlags,
    ModeFlags,
    OutputFlags,
    ShowFlags,
    SourceFlags,
    TargetFlags,
    Transfer,
)
from targetclip import command

ROOT = Path(__file__).parents[1]
MODULES = sorted(  # those that run as `python -m`
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("data", "train", "eval")
    for path in (ROOT / package).rglob("*.py")
    if re.search(r"^    start\(", path.read_text(), re.MULTILINE)
)
GROUPS: dict[str, Any] = {
    "target": TargetFlags,
    "source": SourceFlags,
    "edit": EditFlags,
    "show": ShowFlags,
    "search": ModeFlags,
    "output": OutputFlags,
    "machine": MachineFlags,
}


def transfer(**flags: Any) -> Transfer:
    """Return the options of a transfer by the names of its flags, whatever group they are in."""
    given = {"target": (Path("t.png"),), "out": Path("out"), **flags}
    groups = {}
    for name, kind in GROUPS.items():
        its = [field.name for field in fields(kind) if field.name in given]
        groups[name] = kind(**{flag: given.pop(flag) for flag in its})
    assert not given, f"no such flags: {[*given]}"
    return Transfer(**groups)


def exit_code(*arguments: object) -> int:
    """Run `targetclip` with arguments; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def module_exit_code(module: ModuleType, *arguments: object) -> int:
    """Run a `python -m` command of data, train or eval, or predictor.cli; return its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        if hasattr(module, "main"):  # predictor.cli
            module.main()
        prog = f"python -m {module.__name__}"
        command.main(module.run, module.Config, module.__doc__, prog)
    return int(ended.value.code or 0)


def report_of(out: Path) -> dict[str, Any]:
    """Read report.json as any reader of JSON does: NaN is refused."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert isinstance(report, dict)
    return report


def one_line(text: str) -> str:
    """Return the only line of an error."""
    [line] = [line for line in text.splitlines() if not line.startswith("targetclip: loading ")]
    assert line.startswith("targetclip: ")
    return line
