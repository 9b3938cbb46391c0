"""Answers right and wrong, with what differs between the expected and the given marked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

from schemas.report import CriteriaReport, Example
from tasks.report.inputs import BASE, FINISHED, TITLES, Inputs

#: Shown of each kind and subject: enough to see a pattern, few enough to read.
SHOWN = 6

#: Characters of a text that are shown. Also bounds the work of `differences`.
LONGEST = 1200

#: Texts with a smaller share in common differ as a whole: a few equal commas say nothing.
ALIKE = 0.3

TOKEN = re.compile(r"\w+|\s+|[^\w\s]")


@dataclass(frozen=True)
class Span:
    text: str
    differs: bool


@dataclass(frozen=True)
class Card:
    """One held-out row. base: the untouched base's answer to it, where that is known. image: a data
    URI."""

    prompt: str
    expected: list[Span]
    got: list[Span]
    base: str | None
    image: str | None


@dataclass(frozen=True)
class Answers:
    """The examples of one subject; `open` for the one that a reader wants first."""

    subject: str
    open: bool
    wrong: list[Card]
    right: list[Card]


def answers(inputs: Inputs, selected: str) -> list[Answers]:
    """Examples of every subject, the finished model's (else the selected one's) first."""
    first = FINISHED if FINISHED in inputs.reports else selected
    order = [first, *(name for name in inputs.reports if name not in (first, BASE)), BASE]
    base = {example.prompt: example.got for example in inputs.reports[BASE].examples}
    made = []
    for name in order:
        report = inputs.reports[name]
        known = base if name != BASE else {}
        wrong, right = (_cards(report, flag, known) for flag in (False, True))
        if wrong or right:
            made.append(Answers(TITLES.get(name, name), name == first, wrong, right))
    return made


def _cards(report: CriteriaReport, right: bool, base: dict[str, str]) -> list[Card]:
    rows = [example for example in report.examples if example.right == right]
    return [_card(example, base.get(example.prompt)) for example in rows[:SHOWN]]


def _card(example: Example, base: str | None) -> Card:
    expected, got = differences(clipped(example.expected), clipped(example.got))
    return Card(
        prompt=clipped(example.prompt),
        expected=expected,
        got=got,
        base=None if base is None else clipped(base),
        image=example.image,
    )


def differences(expected: str, got: str) -> tuple[list[Span], list[Span]]:
    """Both texts in spans; those that the other lacks differ. Compared by words and signs."""
    left, right = TOKEN.findall(expected), TOKEN.findall(got)
    matcher = SequenceMatcher(None, left, right, autojunk=False)
    if expected and got and matcher.ratio() < ALIKE:
        return [Span(expected, True)], [Span(got, True)]
    spans: tuple[list[Span], list[Span]] = ([], [])
    for tag, left_from, left_to, right_from, right_to in matcher.get_opcodes():
        if left_to > left_from:
            spans[0].append(Span("".join(left[left_from:left_to]), tag != "equal"))
        if right_to > right_from:
            spans[1].append(Span("".join(right[right_from:right_to]), tag != "equal"))
    return spans


def clipped(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning with the number of characters left out."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} … ({len(text) - longest:,} more characters)"
