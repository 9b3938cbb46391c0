"""Paired tests of two candidates that answered the same rows.

McNemar 1947 (its exact form: a binomial test of the rows that one has right and the other not);
the paired bootstrap, Efron and Tibshirani 1993.

Shapes: N rows, R resamples, S seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from schemas.errors import StageError
from schemas.report import Seeded
from tasks.core.bootstrap import SIDES, Statistic, Values, resampled


@dataclass(frozen=True)
class Gap:
    """A difference with its 95 % interval, and how likely one as large is where there is none."""

    value: float
    low: float
    high: float
    p: float


class Resamples:
    """Rows and seeds drawn anew, the same for every candidate that is asked about.

    Drawn from S seeds, a resample varies by (S - 1) / S of what seeds vary: with few of them the
    intervals are a little narrow.
    """

    def __init__(self, count: int, seeds: int) -> None:
        self._count = count
        share = np.full(seeds, 1 / seeds)
        self._seeds_RS = np.random.default_rng(1).multinomial(seeds, share, count) / seeds

    def means(self, statistics: list[Statistic]) -> Values:
        """The mean over seeds in each resample, [R]. statistics: one a seed, of the same rows."""
        rows = {statistic.rows for statistic in statistics}
        if len(rows) != 1:
            raise StageError(f"the seeds of a candidate were measured on {sorted(rows)} rows")
        values_RS = np.concatenate(
            [
                np.stack([statistic(weights) for statistic in statistics], axis=1)
                for weights in resampled(rows.pop(), self._count)
            ]
        )
        return np.asarray((values_RS * self._seeds_RS).sum(axis=1))


def over_seeds(statistics: list[Statistic], resamples: Resamples) -> Seeded:
    """The mean over seeds; with one seed the interval is that of `bootstrap.interval`."""
    values = [statistic.value for statistic in statistics]
    low, high = np.quantile(resamples.means(statistics), SIDES)
    return Seeded(value=float(np.mean(values)), low=float(low), high=float(high), seeds=values)


def difference(first: list[Statistic], second: list[Statistic], gaps_R: Values) -> Gap:
    """The mean over seeds of first minus second. gaps_R: the same in each resample."""
    value = float(np.mean([a.value - b.value for a, b in zip(first, second, strict=True)]))
    low, high = np.quantile(gaps_R, SIDES)
    # Resamples on the far side of zero, beside the data themselves.
    tail = min(int((gaps_R <= 0).sum()), int((gaps_R >= 0).sum()))
    p = (tail + 1) * least_p(len(gaps_R))
    return Gap(value, float(low), float(high), min(1.0, p))


def least_p(resamples: int) -> float:
    """The smallest p that so many resamples can give: the data are one more draw, on two sides."""
    return 2 / (resamples + 1)


def mcnemar(first: Statistic, second: Statistic) -> float | None:
    """p of the exact test, or None where rows are not right or wrong."""
    if not (_is_binary(first) and _is_binary(second)):
        return None
    one_N, other_N = first.columns_N2[:, 0], second.columns_N2[:, 0]
    only_one, only_other = int((one_N > other_N).sum()), int((one_N < other_N).sum())
    rows = only_one + only_other
    tail = sum(math.comb(rows, k) for k in range(min(only_one, only_other) + 1))
    # Integers until here: 2 ** rows is larger than any float from 1,024 rows on.
    return float(min(1.0, 2 * tail / 2**rows))


def _is_binary(statistic: Statistic) -> bool:
    top_N, bottom_N = statistic.columns_N2.T
    return statistic.kind == "ratio" and bool(
        np.isin(top_N, (0, 1)).all() and (bottom_N == 1).all()
    )
