"""Rows that are equal after normalisation, and the hold-out, both by the rows' digests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Digests = NDArray[np.uint64]


def first_equal(digests: Digests) -> NDArray[np.int64]:
    """For each row of [N, 2] digests, the index of the first row that equals it (maybe its own)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal rows stay in file order
    ordered = digests[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[fresh][np.cumsum(fresh) - 1]
    return first


def equal_in(digests: Digests, others: Digests) -> NDArray[np.int64]:
    """For each row, the index of the first equal row of `others`, or -1."""
    first = first_equal(np.concatenate([others, digests]))[len(others) :]
    return np.where(first < len(others), first, -1)


def held_out(digests: Digests, share: float) -> NDArray[np.bool_]:
    """Whether each row belongs to the hold-out: a function of the row alone, so it never drifts.
    A larger share holds all rows of a smaller one."""
    # 53 bits: every such integer is a float, and so is its quotient.
    return (digests[:, 0] >> np.uint64(11)).astype(np.float64) / 2.0**53 < share


def sampled(digests: Digests, count: int) -> NDArray[np.bool_]:
    """Choose `count` rows by their digests; by the half that `held_out` does not look at."""
    chosen = np.zeros(len(digests), bool)
    chosen[np.lexsort((digests[:, 0], digests[:, 1]))[:count]] = True
    return chosen
