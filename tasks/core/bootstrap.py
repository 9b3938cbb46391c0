"""Percentile bootstrap over rows (Efron 1979): how far a figure depends on the rows drawn.

A statistic is a function of row weights: ones give the figure itself, the counts of a resample
give that resample's figure, many resamples at a time as one matrix product. It is kept as two
numbers a row, so that an evaluation can leave it in a file and a comparison take it up again.

Shapes: N rows, R resamples (or one, for the figure itself), C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from schemas.report import Interval
from tasks.core.files import write_atomic

Weights = NDArray[np.float64]
Values = NDArray[np.float64]

#: Weights held at a time: 2**22 of them are 32 MiB.
CHUNK = 2**22


@dataclass(frozen=True)
class Statistic:
    """A figure of weighted rows: weights [R, N] to values [R].

    kind: a name in `KINDS`. columns_N2: what it reads of each row.
    """

    kind: str
    columns_N2: NDArray[np.float64]

    def __call__(self, weights_RN: Weights) -> Values:
        return KINDS[self.kind](self.columns_N2, weights_RN)

    @property
    def rows(self) -> int:
        return len(self.columns_N2)

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return float(self(np.ones((1, self.rows)))[0])


def resampled(rows: int, resamples: int, seed: int = 0) -> list[Weights]:
    """The counts of rows in each resample, [R, N] in chunks. Same arguments, same resamples: what
    is computed from them is paired."""
    draws = np.random.default_rng(seed)
    share = np.full(rows, 1 / rows)
    chunk = max(1, CHUNK // rows)
    return [
        draws.multinomial(rows, share, min(chunk, resamples - done)).astype(float)
        for done in range(0, resamples, chunk)
    ]


def interval(statistic: Statistic, resamples: int, seed: int = 0) -> Interval:
    """The figure on all rows, and the 2.5 % and 97.5 % quantiles of its resampled values.

    Args:
        seed: same rows, same seed: the same interval, and paired resamples between subjects.
    """
    chunks = resampled(statistic.rows, resamples, seed)
    low, high = np.quantile(np.concatenate([statistic(weights) for weights in chunks]), SIDES)
    return Interval(value=statistic.value, low=float(low), high=float(high))


#: The ends of a 95 % interval.
SIDES = [0.025, 0.975]


def ratio(top_N: NDArray[Any], bottom_N: NDArray[Any]) -> Statistic:
    """Sum over sum, e.g. summed loss over tokens. 0 / 0 is 0: a resample with nothing to count."""
    return Statistic("ratio", np.stack([top_N, bottom_N], axis=1).astype(np.float64))


def mean(values_N: NDArray[Any]) -> Statistic:
    return ratio(values_N, np.ones(len(values_N)))


def exponential(of: Statistic) -> Statistic:
    """exp of a ratio: perplexity from loss per token."""
    assert of.kind == "ratio"
    return Statistic("exp_ratio", of.columns_N2)


def f1(
    true_N: NDArray[np.int64], extra_N: NDArray[np.int64], missed_N: NDArray[np.int64]
) -> Statistic:
    """Micro-averaged F1 = 2 TP / (2 TP + FP + FN) of counts per row."""
    return ratio(2 * true_N, 2 * true_N + extra_N + missed_N)


def macro_f1(expected_N: NDArray[np.int64], got_N: NDArray[np.int64]) -> Statistic:
    """The mean of the classes' F1, over the classes that are expected or predicted at all."""
    return Statistic("macro_f1", np.stack([expected_N, got_N], axis=1).astype(np.float64))


def save_statistics(statistics: dict[str, Statistic], path: Path) -> None:
    """One file for all metrics of a subject."""
    tensors = {name: statistic.columns_N2 for name, statistic in statistics.items()}
    kinds = {name: statistic.kind for name, statistic in statistics.items()}
    # Contiguous, because safetensors writes the memory as it lies.
    whole = {name: np.ascontiguousarray(columns) for name, columns in tensors.items()}
    write_atomic(path, save(whole, {"kinds": json.dumps(kinds, sort_keys=True)}))


def load_statistics(path: Path) -> dict[str, Statistic]:
    with safe_open(path, framework="np") as file:
        kinds = json.loads(file.metadata()["kinds"])
        return {name: Statistic(kinds[name], file.get_tensor(name)) for name in sorted(kinds)}


def _ratio(columns_N2: Values, weights_RN: Weights) -> Values:
    top_R, bottom_R = (weights_RN @ columns_N2).T
    return _divide(top_R, bottom_R)


def _exp_ratio(columns_N2: Values, weights_RN: Weights) -> Values:
    return np.asarray(np.exp(_ratio(columns_N2, weights_RN)))


def _macro_f1(columns_N2: Values, weights_RN: Weights) -> Values:
    expected_N, got_N = columns_N2.astype(np.int64).T
    one_hot = np.eye(int(columns_N2.max()) + 1)
    expected_NC, got_NC = one_hot[expected_N], one_hot[got_N]
    support_RC = weights_RN @ (expected_NC + got_NC)  # TP + FN + TP + FP
    f1_RC = _divide(2 * (weights_RN @ (expected_NC * got_NC)), support_RC)
    return _divide(f1_RC.sum(axis=1), (support_RC > 0).sum(axis=1))


KINDS: dict[str, Callable[[Values, Weights], Values]] = {
    "ratio": _ratio,
    "exp_ratio": _exp_ratio,
    "macro_f1": _macro_f1,
}


def _divide(top: Values, bottom: NDArray[Any]) -> Values:
    quotient = np.zeros_like(top)
    np.divide(top, bottom, out=quotient, where=bottom > 0)
    return quotient
