"""Percentile bootstrap over rows (Efron 1979): how far a figure depends on the rows drawn.

A statistic is a function of row weights: ones give the figure itself, the counts of a resample
give that resample's figure, many resamples at a time as one matrix product.

Shapes: N rows, R resamples (or one, for the figure itself), C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.report import Interval

Weights = NDArray[np.float64]
Statistic = Callable[[Weights], NDArray[np.float64]]

#: Weights held at a time: 2**22 of them are 32 MiB.
CHUNK = 2**22


def interval(statistic: Statistic, rows: int, resamples: int, seed: int = 0) -> Interval:
    """The figure on all rows, and the 2.5 % and 97.5 % quantiles of its resampled values.

    Args:
        statistic: weights [R, N] to values [R].
        seed: same rows, same seed: the same interval, and paired resamples between subjects.
    """
    draws = np.random.default_rng(seed)
    share = np.full(rows, 1 / rows)
    chunk = max(1, CHUNK // rows)
    values = np.concatenate(
        [
            statistic(draws.multinomial(rows, share, min(chunk, resamples - done)).astype(float))
            for done in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(value=float(statistic(np.ones((1, rows)))[0]), low=float(low), high=float(high))


def ratio(top_N: NDArray[Any], bottom_N: NDArray[Any]) -> Statistic:
    """Sum over sum, e.g. summed loss over tokens. 0 / 0 is 0: a resample with nothing to count."""
    columns = np.stack([top_N, bottom_N], axis=1).astype(np.float64)

    def statistic(weights_RN: Weights) -> NDArray[np.float64]:
        top_R, bottom_R = (weights_RN @ columns).T
        return _divide(top_R, bottom_R)

    return statistic


def mean(values_N: NDArray[Any]) -> Statistic:
    return ratio(values_N, np.ones(len(values_N)))


def exponential(statistic: Statistic) -> Statistic:
    """exp of a statistic: perplexity from loss per token."""
    return lambda weights_RN: np.exp(statistic(weights_RN))


def f1(
    true_N: NDArray[np.int64], extra_N: NDArray[np.int64], missed_N: NDArray[np.int64]
) -> Statistic:
    """Micro-averaged F1 = 2 TP / (2 TP + FP + FN) of counts per row."""
    return ratio(2 * true_N, 2 * true_N + extra_N + missed_N)


def macro_f1(expected_N: NDArray[np.int64], got_N: NDArray[np.int64], classes: int) -> Statistic:
    """The mean of the classes' F1, over the classes that are expected or predicted at all."""
    expected_NC = np.eye(classes)[expected_N]
    got_NC = np.eye(classes)[got_N]
    both_NC = expected_NC * got_NC

    def statistic(weights_RN: Weights) -> NDArray[np.float64]:
        support_RC = weights_RN @ (expected_NC + got_NC)  # TP + FN + TP + FP
        f1_RC = _divide(2 * (weights_RN @ both_NC), support_RC)
        return _divide(f1_RC.sum(axis=1), (support_RC > 0).sum(axis=1))

    return statistic


def _divide(top: NDArray[np.float64], bottom: NDArray[Any]) -> NDArray[np.float64]:
    quotient = np.zeros_like(top)
    np.divide(top, bottom, out=quotient, where=bottom > 0)
    return quotient
