"""Versions as people name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import UserError
from tasks.register.named import named
from tasks.register.promote import promote


@pytest.fixture
def three(home: Path, add_version: Any) -> Path:
    """Three versions of `answers`, the second its champion, the third never verified."""
    for verified in (True, True, False):
        add_version("answers", verified=verified)
    promote(home, "answers", "2", "", {})
    return home


@pytest.mark.parametrize(
    ("text", "version"),
    [("answers@champion", "2"), ("answers/1", "1"), ("models:/answers@champion", "2")],
)
def test_a_version_is_named_as_mlflow_names_it(text: str, version: str, three: Path) -> None:
    record = named(three, text)
    assert (record.name, record.version) == ("answers", version)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answers", r"names no version\n.*NAME@champion"),
        ("answers/first", "names no version"),
        ("answer@champion", r"no registered model.*\n.*did you mean answers\?"),
        ("answers/9", r"no such version\n.*1, 2, 3"),
        ("answers@best", r"alias best\n.*choose answers@champion \(version 2\)"),
        ("answers/3", "never shown to load as it was trained"),
    ],
)
def test_what_names_no_version_is_told(text: str, message: str, three: Path) -> None:
    with pytest.raises(UserError, match=message):
        named(three, text)
