"""What the documents name is there."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def rows(document: str) -> list[list[str]]:
    """The cells of each line of a Markdown table, without its head."""
    lines = [line for line in (ROOT / document).read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@cache
def functions_of(path: Path) -> set[str]:
    """The names of the functions of a file."""
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


COMPLAINTS = {complaint: shown for complaint, _, shown in rows("docs/complaints.md")}


def test_there_are_ten_complaints() -> None:
    assert len(COMPLAINTS) == 10


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_each_complaint_is_held_off_by_tests_that_exist(complaint: str) -> None:
    named = re.findall(r"`(tests/\S+?)::(test_\w+)`", COMPLAINTS[complaint])
    assert named
    for file, name in named:
        assert name in functions_of(ROOT / file), f"{file} has no {name}"


def test_every_dependency_has_its_reason() -> None:
    """Names of pyproject.toml, all extras, in the first column of the page that says why."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        canonicalize_name(Requirement(line).name)
        for group in (project["dependencies"], *extras)
        for line in group
    }
    table = rows("docs/decisions/dependencies.md")
    given = {
        canonicalize_name(name)
        for packages, why, _ in table
        for name in re.sub(r"\*\*\w+\*\*", "", packages).replace(" ", "").split(",")
        if why
    }
    assert wanted - given == set(), "without a line in docs/decisions/dependencies.md"
    assert given - wanted == set(), "in docs/decisions/dependencies.md and not in pyproject.toml"
