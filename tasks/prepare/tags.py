"""Spans of characters as labels of tokens, for the rows of one split.

A span must begin where a token begins and end where one ends: what is learned is then exactly
what was marked. The white space that a tokenizer puts into a token is no part of it.

Shapes: T tokens of all rows, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tasks.core.entities import IGNORED, OUTSIDE, begins, inside
from tasks.core.tokens import TokenRows
from tasks.prepare.records import Span
from tasks.prepare.spans import Rules, Unfit, shortened

Place = tuple[int, int]


@dataclass
class Tags:
    """The labels of a split's tokens, as they are gathered.

    types: type of span: its number within this split, in the order of appearance.
    labels, chars: of each token, see `tasks/core/tokens.py`.
    """

    types: dict[str, int] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    chars: list[Place] = field(default_factory=list)
    _counts: list[tuple[int, int]] = field(default_factory=list)

    def add(
        self, text: str, spans: list[Span], offsets: list[Place], rules: Rules, *, cut: bool
    ) -> None:
        """Label the tokens of a row. offsets: where each stands. cut: the row is truncated.

        Raises:
            Unfit: a span that is not some tokens exactly, or a text of which none is left.
        """
        numbered = [
            (start, end, self.types.setdefault(label, len(self.types)))
            for start, end, label in spans
        ]
        chars = [trimmed(text, place) for place in offsets]
        labels = labels_of(chars, numbered)
        if cut:
            chars, labels = shortened(chars, rules), shortened(labels, rules)
        if all(label == IGNORED for label in labels):
            raise Unfit("no_answer_token")
        last = max(end for _, end in chars)
        self.labels += labels
        self.chars += chars
        self._counts.append((len(spans), sum(end > last for _, end, _ in spans)))

    @property
    def counts_N2(self) -> NDArray[np.int64]:
        """The spans of each row, and those of them that end past its cut."""
        return np.array(self._counts, np.int64).reshape(-1, 2)

    def label(self, rows: TokenRows) -> TokenRows:
        """The token rows with these labels, numbered as in `types`."""
        return replace(
            rows,
            token_labels=np.array(self.labels, np.int32),
            token_chars=np.array(self.chars, np.int32).reshape(-1, 2),
        )


def trimmed(text: str, place: Place) -> Place:
    """A token's characters without white space at its ends."""
    start, end = place
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def labels_of(chars: list[Place], spans: list[tuple[int, int, int]]) -> list[int]:
    """IOB2 labels of tokens at these characters, for spans of (start, end, type).

    Raises:
        Unfit: a span that begins or ends where no token does.
    """
    labels = [OUTSIDE if start < end else IGNORED for start, end in chars]
    for first, last, type_ in spans:
        touched = [
            token
            for token, (start, end) in enumerate(chars)
            if start < end and start < last and end > first
        ]
        # Tokens may share a character (its bytes), so the ends are not those of first and last.
        if not touched or (first, last) != (
            min(chars[token][0] for token in touched),
            max(chars[token][1] for token in touched),
        ):
            raise Unfit(f"span_off_tokens:{first}-{last}")
        for token in touched:
            labels[token] = inside(type_)
        labels[touched[0]] = begins(type_)
    return labels


def renumbered(labels_T: NDArray[np.int32], numbers: list[int]) -> NDArray[np.int32]:
    """Labels whose type i becomes type numbers[i]; O and IGNORED stay."""
    table = [OUTSIDE, *(label(number) for number in numbers for label in (begins, inside))]
    # A token that is ignored looks up nothing: index 0 is as good as any.
    found = np.array(table, np.int32)[np.maximum(labels_T, OUTSIDE)]
    return np.where(labels_T == IGNORED, np.int32(IGNORED), found)
