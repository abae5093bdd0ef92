"""What holds for every `python -m` command of data, train and eval."""

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_runs import MODULES

from targetclip.command import parse


def least_options(kind: type, folder: Path) -> dict[str, Any]:
    """Return a value for each option that has no default."""
    values = {"world": "avatars", "mappers": (folder / "mapper",), "out": folder / "out"}
    return {
        field.name: values.get(field.name, folder)
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_no_default_that_is_none(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(import_module(module).Config, module, None, ["--help"])
    assert ended.value.code == 0
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--out" in page and "(default: None)" not in page and "(default: )" not in page


@pytest.mark.parametrize("launched", ["fp16", "bananas"])
@pytest.mark.parametrize("module", MODULES)
def test_a_precision_of_the_launcher_that_is_not_computed_is_refused_before_anything_is_done(
    module: str, launched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = import_module(module)
    if "precision" not in {field.name for field in dataclasses.fields(command.Config)}:
        pytest.skip("computes in one precision, and records none")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=f"expected no or bf16, found '{launched}'"):
        command.run(command.Config(**least_options(command.Config, tmp_path)))
    assert not (tmp_path / "out").exists()
