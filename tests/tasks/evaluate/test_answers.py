"""Field F1 and exact match: hand cases, and a slow reference over random JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluate.answers import exact_match, field_counts, fields, parse_object

HAND = [
    # expected, got, (right, extra, missed)
    ({"a": 1}, '{"a": 1}', (1, 0, 0)),
    ({"a": 1}, '  {"a" : 1.0}\n', (1, 0, 0)),  # one number, two spellings
    ({"a": 1}, '{"a": "1"}', (0, 1, 1)),  # a string is no number
    ({"a": 1}, '{"a": true}', (0, 1, 1)),  # nor is true, though Python says True == 1
    ({"a": None}, '{"a": null}', (1, 0, 0)),
    ({"a": 1, "b": 2}, '{"a": 1}', (1, 0, 1)),
    ({"a": 1}, '{"a": 1, "b": 2}', (1, 1, 0)),
    ({"a": {"b": 1, "c": 2}}, '{"a": {"b": 1, "c": 3}}', (1, 1, 1)),
    ({"a": {"b": 1}}, '{"b": 1}', (0, 1, 1)),  # the path counts, not the last key
    ({"a": [1, 2]}, '{"a": [2, 1]}', (0, 2, 2)),  # the order of a list is part of it
    ({"a": [1, 2]}, '{"a": [1]}', (1, 0, 1)),
    ({"a": []}, '{"a": []}', (1, 0, 0)),  # an empty list is a value
    ({"a": []}, '{"a": {}}', (0, 1, 1)),
    ({"a": 1, "b": 2}, "a is 1 and b is 2", (0, 0, 2)),
    ({"a": 1}, '{"a": 1} and more', (0, 0, 1)),
    ({"a": 1}, '{"a": 1', (0, 0, 1)),
    ({"a": 1}, "[1]", (0, 0, 1)),
    ({"a": 1}, '{"a": NaN}', (0, 0, 1)),  # Python reads it, JSON does not know it
    ({"a": 1}, "[" * 100_000, (0, 0, 1)),  # too deep for the parser
    ({"a": 1}, "", (0, 0, 1)),
    ({}, "{}", (0, 0, 0)),
    ({}, '{"a": 1}', (0, 1, 0)),
]


@pytest.mark.parametrize(("expected", "got", "counts"), HAND)
def test_hand_cases(expected: dict[str, Any], got: str, counts: tuple[int, int, int]) -> None:
    assert field_counts(expected, got) == counts


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text("ab", max_size=2), VALUES, max_size=4)


def slow_leaves(value: Any, path: str = "$") -> list[str]:
    """Every leaf as one line of text: path, and the value as JSON."""
    if isinstance(value, dict) and value:
        return [leaf for key in value for leaf in slow_leaves(value[key], f"{path}.{key!r}")]
    if isinstance(value, list) and value:
        return [
            leaf
            for place in range(len(value))
            for leaf in slow_leaves(value[place], f"{path}[{place}]")
        ]
    return [] if path == "$" else [f"{path} = {json.dumps(value)}"]


@given(OBJECTS, OBJECTS)
def test_slow_reference(expected: dict[str, Any], got: dict[str, Any]) -> None:
    wanted, given_ = slow_leaves(expected), slow_leaves(got)
    both = [leaf for leaf in wanted if leaf in given_]
    counts = (len(both), len(given_) - len(both), len(wanted) - len(both))
    assert field_counts(expected, json.dumps(got)) == counts


@given(OBJECTS)
def test_the_expected_answer_has_every_field(expected: dict[str, Any]) -> None:
    text = json.dumps(expected, indent=2)
    assert parse_object(text) == expected
    assert field_counts(expected, text) == (len(fields(expected)), 0, 0)


def test_exact_match_ignores_white_space_at_the_ends_only() -> None:
    assert exact_match('{"a": 1}', '\n{"a": 1} ')
    assert not exact_match('{"a": 1}', '{"a":1}')
    assert not exact_match("Yes", "yes")
