"""Spans as a report shows them, and how far the predicted ones are the true ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.core.entities import spans_of, type_names
from tasks.core.tokens import TokenRows
from tasks.evaluate.answers import FieldCounts
from tasks.evaluate.scoring import TokenScores

#: A span: start, end (characters, exclusive), label and text; a predicted one has a score too.
Span = dict[str, Any]


def marked(text: dict[str, Any]) -> list[Span]:
    """The true spans of a test row, those past max_length among them."""
    return [{**span, "text": text["prompt"][span["start"] : span["end"]]} for span in text["spans"]]


def predicted(
    text: dict[str, Any], rows: TokenRows, index: int, scores: TokenScores, labels: list[str]
) -> list[Span]:
    """The spans that the labels of a row's tokens spell. score: the mean of its tokens'
    probabilities."""
    assert rows.token_chars is not None
    place, types = rows.place(index), type_names(labels)
    return [
        {
            "start": found.start,
            "end": found.end,
            "label": types[found.type],
            "text": text["prompt"][found.start : found.end],
            "score": float(np.mean(scores.probability_T[place][found.tokens])),
        }
        for found in spans_of(scores.label_T[place], rows.token_chars[place])
    ]


def span_counts(expected: list[Span], got: list[Span]) -> FieldCounts:
    """Spans of one row: right in both, only predicted, only expected."""
    wanted, given = (
        {(s["start"], s["end"], s["label"]) for s in spans} for spans in (expected, got)
    )
    return FieldCounts(len(wanted & given), len(given - wanted), len(wanted - given))


def in_words(answer: str | list[Span]) -> str:
    """An answer as an example shows it: a text as it is, spans one a line."""
    if isinstance(answer, str):
        return answer
    lines = [f"{s['label']} [{s['start']}:{s['end']}] {s['text']}" for s in answer]
    return "\n".join(lines) or "no span"
