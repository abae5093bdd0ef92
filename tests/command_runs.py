"""Runs of the `targetclip` command in the process of a test, and their results."""

import json
from pathlib import Path
from typing import Any

import pytest

from predictor import cli


def exit_code(*arguments: object) -> int:
    """Run `targetclip` with arguments; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
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
    [line] = text.splitlines()
    assert line.startswith("targetclip: ")
    return line
