"""How to cite, contribute and report: what other programs and people rely on."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    return content


def test_the_citation_has_what_its_format_requires(citation: dict[str, Any]) -> None:
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    assert citation["type"] == "software"
    for entry in (citation, *citation["references"]):
        assert entry["title"] and entry["authors"]
        for author in entry["authors"]:
            # An entity has a name, a person others; unknown keys are not valid.
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    known = {"cff-version", "message", "type", "title", "abstract", "authors", "version"}
    assert set(citation) <= known | {"license", "keywords", "references"}


def test_the_citation_is_of_this_version_and_licence(citation: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["title"] == project["name"] and citation["version"] == project["version"]
    assert citation["license"] == project["license"]


def test_the_citation_names_the_paper(citation: dict[str, Any]) -> None:
    [paper] = citation["references"]
    assert paper["type"] == "conference-paper" and paper["year"] == 2022
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Chefer", "Benaim", "Paiss", "Wolf"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert paper["url"] == project["urls"]["Paper"] and paper["conference"]["name"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_pages_for_contributors_are_short_and_name_only_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert len(text.splitlines()) <= 40
    for path in re.findall(r"`([\w./]+/[\w./]+)`|\]\(([\w./]+)\)", text):
        assert (ROOT / "".join(path)).exists(), path
