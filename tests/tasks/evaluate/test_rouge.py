"""ROUGE-L against its definition, worked out slowly."""

from __future__ import annotations

import random

import pytest

from tasks.evaluate.answers import common_subsequence, rouge_l


def slow(one: list[str], other: list[str]) -> int:
    """The table of the textbook."""
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        for j, said in enumerate(other, 1):
            lengths[i][j] = (
                lengths[i - 1][j - 1] + 1
                if word == said
                else max(lengths[i - 1][j], lengths[i][j - 1])
            )
    return lengths[-1][-1]


def test_words_in_common_are_those_of_the_textbook() -> None:
    draw = random.Random(0)
    for _ in range(300):
        one, other = (draw.choices("abcd", k=draw.randint(0, 90)) for _ in range(2))
        assert common_subsequence(one, other) == slow(one, other)


@pytest.mark.parametrize(
    ("expected", "got", "score"),
    [
        # Lin 2004, section 3: recall and precision 3/4 of "police killed the gunman".
        ("police killed the gunman", "police kill the gunman", 3 / 4),
        ("police killed the gunman", "the gunman kill police", 2 / 4),
        ("Größe: 12.", "größe 12", 1.0),
        ("one two three", "one", 2 * 1 / (3 + 1)),
        ("one", "", 0.0),
        ("?", "!", 1.0),
    ],
)
def test_the_score_is_the_f1(expected: str, got: str, score: float) -> None:
    assert rouge_l(expected, got) == pytest.approx(score)
