"""Which rows make which optimiser step.

A plan is a pure function of (seed, epoch): the data position of a run is its step number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The rows of every step of every epoch.

    lengths: tokens of each row, [rows].
    batch_tokens: tokens that a step should have; an epoch is cut into equal shares of about
        that many, so that it has no small last step.
    """

    lengths: NDArray[np.int64]
    batch_tokens: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        steps = round(int(self.lengths.sum()) / self.batch_tokens)
        return min(max(steps, 1), len(self.lengths))

    def epoch(self, epoch: int) -> list[Rows]:
        """The row numbers of each step of one epoch; every row is in exactly one step."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        return equal_shares(order, self.lengths, self.steps_per_epoch)


def equal_shares(order: Rows, lengths: NDArray[np.int64], count: int) -> list[Rows]:
    """`order` cut into `count` parts of about as many tokens, none of them empty."""
    ends = np.cumsum(lengths[order])
    number = np.arange(1, count)
    cuts = np.searchsorted(ends, ends[-1] * number / count)
    # A row longer than a share would leave the next part empty: give each one row.
    cuts = np.maximum.accumulate(np.maximum(cuts, 1) - number) + number
    cuts = np.minimum(cuts, len(order) - count + number)
    return [np.asarray(part, dtype=np.int64) for part in np.split(order, cuts)]
