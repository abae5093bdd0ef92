"""Fixtures shared by the tests of the method."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def seeded_weights() -> ModuleType:
    """tests/fixtures/seeded_weights.py as a module (tests are not a package to import from)."""
    path = FIXTURES / "seeded_weights.py"
    spec = importlib.util.spec_from_file_location("seeded_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
