"""Spans of a text as one label a token, and back: IOB2 (Ramshaw and Marcus 1995, cmp-lg/9505040).

A head for K types of span has 1 + 2 K outputs: O, then B-type and I-type of each. Back from
labels a B starts a span, an I of the same type goes on with it, and an I after anything else
starts a span too: the rule of the CoNLL 2003 script, and of seqeval's default.
`tasks/register/served_model.py`, which travels alone, has the same rule.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: The label of a token that stands for no character of the text, and is neither learned nor read.
IGNORED = -100
OUTSIDE = 0


class Found(NamedTuple):
    """A span: its characters, end exclusive; its type's number; its tokens."""

    start: int
    end: int
    type: int
    tokens: list[int]


def begins(type_: int) -> int:
    return 1 + 2 * type_


def inside(type_: int) -> int:
    return 2 + 2 * type_


def label_names(types: Sequence[str]) -> list[str]:
    """The outputs of the head, in their order."""
    return ["O", *(f"{letter}-{name}" for name in types for letter in "BI")]


def type_names(labels: Sequence[str]) -> list[str]:
    """The types of span of a head with these outputs."""
    return [label.removeprefix("B-") for label in labels[1::2]]


def spans_of(labels_T: Sequence[int] | NDArray[Any], chars_T2: NDArray[np.int32]) -> list[Found]:
    """The spans that labels spell. chars_T2: of each token; an empty place is no token's."""
    found: list[Found] = []
    current = -1
    for token, (label, (start, end)) in enumerate(
        zip(map(int, labels_T), chars_T2.tolist(), strict=True)
    ):
        if start == end:
            continue
        if label == OUTSIDE:
            current = -1
            continue
        type_ = (label - 1) // 2
        if label == inside(type_) and type_ == current:
            found[-1] = found[-1]._replace(end=end, tokens=[*found[-1].tokens, token])
        else:
            found.append(Found(start, end, type_, [token]))
        current = type_
    return found
