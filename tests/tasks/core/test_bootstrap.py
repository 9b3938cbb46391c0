"""The statistics against slow references, and the intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core import bootstrap

CLASSES = 4
PAIRS = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=30
)


def slow_macro_f1(expected: list[int], got: list[int]) -> float:
    """By definition, class by class, from precision and recall."""
    scores = []
    for label in sorted(set(expected) | set(got)):
        right = sum(e == g == label for e, g in zip(expected, got, strict=True))
        precision = right / got.count(label) if label in got else 0.0
        recall = right / expected.count(label) if label in expected else 0.0
        both = precision + recall
        scores.append(2 * precision * recall / both if both else 0.0)
    return sum(scores) / len(scores)


@given(PAIRS, st.integers(0, 2**31))
def test_macro_f1_of_all_rows_and_of_resamples(pairs: list[tuple[int, int]], seed: int) -> None:
    """A resample's weights must give what the resample itself, row by row, would give."""
    expected, got = (np.array(column) for column in zip(*pairs, strict=True))
    statistic = bootstrap.macro_f1(expected, got)
    drawn = np.random.default_rng(seed).integers(0, len(pairs), (5, len(pairs)))
    weights = np.stack([np.bincount(rows, minlength=len(pairs)) for rows in drawn]).astype(float)
    fast = statistic(weights)
    slow = [slow_macro_f1(expected[rows].tolist(), got[rows].tolist()) for rows in drawn]
    # Both sum at most four quotients in float64.
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-12)
    assert bootstrap.interval(statistic, 100).value == pytest.approx(
        slow_macro_f1(expected.tolist(), got.tolist()), abs=1e-12
    )


def test_macro_f1_by_hand() -> None:
    # Class 0: precision 1, recall 1/2, F1 2/3. Class 1: precision 1/2, recall 1, F1 2/3.
    # Class 2: predicted once and never right, F1 0. Class 3: neither, so it does not count.
    expected, got = np.array([0, 0, 1, 0]), np.array([0, 1, 1, 2])
    statistic = bootstrap.macro_f1(expected, got)
    by_hand = (2 * 1 * (1 / 3) / (1 + 1 / 3) + 2 / 3 + 0) / 3
    assert statistic(np.ones((1, 4)))[0] == pytest.approx(by_hand)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 9)), min_size=1, max_size=40))
def test_ratio_and_perplexity(rows: list[tuple[float, int]]) -> None:
    loss, tokens = (np.array(column) for column in zip(*rows, strict=True))
    per_token = bootstrap.ratio(loss, tokens)
    found = bootstrap.interval(per_token, 200)
    assert found.value == pytest.approx(math.fsum(loss) / tokens.sum())
    quotients = loss / tokens
    # A ratio of sums lies between the rows' own ratios, and so does every resample's.
    assert quotients.min() - 1e-9 <= found.low <= found.high <= quotients.max() + 1e-9
    perplexity = bootstrap.interval(bootstrap.exponential(per_token), 200)
    assert perplexity.value == pytest.approx(math.exp(found.value))


def test_f1_is_micro_averaged() -> None:
    right, extra, missed = np.array([3, 0]), np.array([1, 0]), np.array([0, 2])
    value = bootstrap.f1(right, extra, missed)(np.ones((1, 2)))[0]
    assert value == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    nothing = np.zeros(2, dtype=np.int64)
    assert bootstrap.f1(nothing, nothing, nothing)(np.ones((1, 2)))[0] == 0.0


def test_same_seed_same_interval_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).random(70)
    whole = bootstrap.interval(bootstrap.mean(values), 400, seed=5)
    monkeypatch.setattr(bootstrap, "CHUNK", 70 * 7)
    assert bootstrap.interval(bootstrap.mean(values), 400, seed=5) == whole
    other = bootstrap.interval(bootstrap.mean(values), 400, seed=6)
    assert (other.low, other.high) != (whole.low, whole.high)


def test_intervals_hold_what_they_promise() -> None:
    """Of 400 samples of 80 coin throws, about 95 % of the intervals hold the coin's true rate.

    The percentile bootstrap covers a little less than it says at 80 rows (about 94 %); the
    binomial deviation over 400 samples is 1.1 points, so [0.90, 0.98] is more than three wide.
    """
    draws = np.random.default_rng(11)
    rate, held = 0.7, 0
    for _ in range(400):
        found = bootstrap.interval(bootstrap.mean(draws.random(80) < rate), 300)
        held += found.low <= rate <= found.high
    assert 0.90 <= held / 400 <= 0.98


def test_interval_is_as_wide_as_theory_says() -> None:
    """For a mean, 2 * 1.96 * deviation / sqrt(rows); 4,000 resamples place it within 5 %."""
    values = np.random.default_rng(2).normal(size=500)
    found = bootstrap.interval(bootstrap.mean(values), 4000)
    assert found.high - found.low == pytest.approx(
        2 * 1.96 * values.std() / math.sqrt(500), rel=0.05
    )
