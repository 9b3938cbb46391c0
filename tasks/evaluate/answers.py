"""How far a written answer is the expected one: exact match, and the fields of JSON objects."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

#: A field: its path from the root, and its value with the value's type, so that 1, "1" and true
#: are three values while 1 and 1.0 are one.
Field = tuple[tuple[str | int, ...], tuple[str, Any]]


#: A word: letters and digits.
WORD = re.compile(r"[^\W_]+")


class FieldCounts(NamedTuple):
    """Fields of one row: right in both, only in the answer, only in what was expected."""

    true_positive: int
    false_positive: int
    false_negative: int


def exact_match(expected: str, got: str) -> bool:
    """The same text but for white space at the ends."""
    return expected.strip() == got.strip()


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole text is, or None. NaN and Infinity are not JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fields(value: Any, path: tuple[str | int, ...] = ()) -> set[Field]:
    """The leaves of a JSON value with their paths; list elements by position.

    An empty object or list inside another value is a leaf of its own, or it would weigh nothing.
    """
    if isinstance(value, dict) and (value or not path):
        return {leaf for key, inner in value.items() for leaf in fields(inner, (*path, key))}
    if isinstance(value, list) and (value or not path):
        return {leaf for index, inner in enumerate(value) for leaf in fields(inner, (*path, index))}
    if isinstance(value, dict | list):
        return {(path, (type(value).__name__, None))}
    kind = "number" if type(value) in (int, float) else type(value).__name__
    return {(path, (kind, value))}


def field_counts(expected: dict[str, Any], got: str) -> FieldCounts:
    """Compare the fields of an answer; one that is no JSON object has none of them."""
    wanted = fields(expected)
    answer = parse_object(got)
    given = set() if answer is None else fields(answer)
    return FieldCounts(len(wanted & given), len(given - wanted), len(wanted - given))


def rouge_l(expected: str, got: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of two texts' words, from 0 to 1.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", with the words as of the
    `rouge_score` package (runs of letters and digits in lower case, no stemming), but of any
    script; each text is one sentence.
    """
    wanted, given = (WORD.findall(text.lower()) for text in (expected, got))
    if not wanted or not given:
        return float(wanted == given)
    return 2 * common_subsequence(wanted, given) / (len(wanted) + len(given))


def common_subsequence(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, a machine word of `one` at a time.

    Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited". Bit i of `row` is 0 where the
    length grows at the i-th word of `one`.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    row = every
    for word in other:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(one) - row.bit_count()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
