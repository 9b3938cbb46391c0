"""Who is told apart from a candidate, with p corrected for the number of others (Holm 1979)."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.report import Comparison

#: A difference is one where chance alone would make one as large less often than this.
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Against:
    """One candidate beside another. difference: its metric minus the other's. p: corrected."""

    label: str
    difference: float
    low: float
    high: float
    p: float

    @property
    def apart(self) -> bool:
        return self.p < SIGNIFICANCE


def best_of(comparison: Comparison) -> str:
    """The candidate with the best metric; of equals the first."""
    sign = 1 if comparison.more_is_better else -1
    values = {
        label: sign * metrics[comparison.metric].value
        for label, metrics in comparison.candidates.items()
    }
    return max(values, key=lambda label: values[label])


def told_apart(comparison: Comparison, best: str, others: list[str]) -> list[Against]:
    """Each of `others` beside `best`, in their order."""
    found: dict[str, Against] = {}
    for pair in comparison.pairs:
        if pair.first == best and pair.second in others:
            ends = -pair.difference, -pair.high, -pair.low
            found[pair.second] = Against(pair.second, *ends, pair.p)
        elif pair.second == best and pair.first in others:
            ends = pair.difference, pair.low, pair.high
            found[pair.first] = Against(pair.first, *ends, pair.p)
    corrected = holm({label: test.p for label, test in found.items()})
    return [
        Against(label, test.difference, test.low, test.high, corrected[label])
        for label in others
        if (test := found.get(label)) is not None
    ]


def holm(p: dict[str, float]) -> dict[str, float]:
    """p corrected for their number: step down, never smaller than the one before."""
    corrected, largest = {}, 0.0
    for done, label in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - done) * p[label]))
        corrected[label] = largest
    return corrected
