"""Who is told apart from the best candidate, and at which learning rates the search looked."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.report import CurvePoint, Interval, Trial
from schemas.stages import PageSpec
from tasks.core.apart import SIGNIFICANCE, best_of, told_apart
from tasks.report.figures import Scale, figure, in_words, scale
from tasks.report.inputs import Inputs
from tasks.report.overhead import as_served

#: From such a ratio of latencies on a candidate is called slower.
NOTICED = 1.05


@dataclass(frozen=True)
class ApartRow:
    """A candidate beside the best one. seeds: its metric with each of them."""

    label: str
    value: str
    seeds: str
    difference: str
    interval: str
    p: str
    verdict: str


@dataclass(frozen=True)
class Apart:
    """The table, and what it speaks of."""

    best: str
    title: str
    unit: str
    seeds: int
    how: str
    rows: list[ApartRow]


def apart(inputs: Inputs) -> Apart | None:
    """Every candidate beside the best, the best first; None where there is one alone."""
    comparison = inputs.comparison
    if len(comparison.candidates) < 2:
        return None
    name, best = comparison.metric, best_of(comparison)
    sign = -1 if comparison.more_is_better else 1
    found = {label: metrics[name] for label, metrics in comparison.candidates.items()}
    others = sorted((one for one in found if one != best), key=lambda one: sign * found[one].value)
    kind = figure(name)
    written = scale(kind, [interval.value for interval in found.values()])
    rows = [
        ApartRow(
            best,
            written.text(found[best].value),
            ", ".join(written.text(value) for value in found[best].seeds),
            "",
            "",
            "",
            "the best",
        )
    ]
    for test in told_apart(comparison, best, others):
        own = found[test.label]
        rows.append(
            ApartRow(
                test.label,
                written.text(own.value),
                ", ".join(written.text(value) for value in own.seeds),
                signed(written, test.difference),
                f"{signed(written, test.low)} to {signed(written, test.high)}",
                "< 0.001" if test.p < 0.001 else f"{test.p:.3f}",
                "told apart" if test.apart else "not distinguishable",
            )
        )
    how = f"{comparison.how[0].upper()}{comparison.how[1:]}."
    return Apart(best, kind.title, written.unit, len(comparison.seeds), how, rows)


def signed(written: Scale, value: float) -> str:
    """With its sign, which is the point of a difference."""
    return ("+" if value > 0 else "") + written.text(value)


def points(name: str, value: float) -> str:
    """A difference: of percentages, points."""
    return in_words(name, value).replace("\u00a0%", "\u00a0points")


def recommendation(spec: PageSpec, inputs: Inputs) -> list[str]:
    """What the choice means beside the others, one sentence each.

    How far the selected one is from the best and at what share of its storage, what the others
    cost at inference, and what each was trained for.
    """
    comparison, chosen = inputs.comparison, spec.selected
    if len(comparison.candidates) < 2:
        return []
    name, best = comparison.metric, best_of(comparison)
    said = []
    values = {label: metrics[name] for label, metrics in comparison.candidates.items()}
    if chosen != best:
        gap = points(name, abs(values[best].value - values[chosen].value))
        said.append(f"{chosen} is within {gap} of the best, {best}.")
    reports = {label: inputs.reports[label] for label in comparison.candidates}
    bytes_of = {label: report.storage.shipped_bytes for label, report in reports.items()}
    largest = max(bytes_of, key=lambda label: bytes_of[label])
    own, most = bytes_of[chosen], bytes_of[largest]
    if own and most / own >= 2:
        said.append(f"It ships 1/{most / own:,.0f} of what {largest} does.")
    intervals = {label: report.intervals() for label, report in reports.items()}
    said += _slower(chosen, intervals, spec.merges)
    tests = told_apart(comparison, best, [label for label in values if label != best])
    equal = [test.label for test in tests if not test.apart]
    if equal:
        said.append(f"Not distinguishable from {best} (p ≥ {SIGNIFICANCE}): {', '.join(equal)}.")
    return said + _budget({label: inputs.curves[label] for label in spec.labels})


def _budget(curves: dict[str, list[CurvePoint]]) -> list[str]:
    """What each was trained for with its first seed: the same for all, or whose is another."""
    spent: dict[tuple[int, int], list[str]] = {}
    for label, curve in curves.items():
        if curve:
            spent.setdefault((curve[-1].step, curve[-1].tokens), []).append(label)
    told = {
        f"{steps:,} steps, {tokens:,} tokens": labels for (steps, tokens), labels in spent.items()
    }
    if len(told) > 1:
        each = "; ".join(f"{', '.join(labels)} {budget}" for budget, labels in told.items())
        return [f"Their budgets differ, which the comparison does not make up for: {each}."]
    return [f"What is trained was trained for {budget} each." for budget in told]


def _slower(chosen: str, intervals: dict[str, dict[str, Interval]], merges: bool) -> list[str]:
    """Those that are slower than the selected one, each as it is served, at reading a prompt or at
    writing a token: the intervals of their ratios to the base do not meet, and they differ by as
    much as anyone would notice. Of one that is slower at both the larger share is told."""
    slower: dict[str, tuple[float, str]] = {}
    for name, words in (("prefill_ratio_b1", "prefill"), ("token_ratio_b1", "per token")):
        own = as_served(intervals[chosen], name, merges)
        for label, found in intervals.items():
            ratio = as_served(found, name, merges)
            if own is None or ratio is None or ratio.low <= own.high:
                continue
            share = ratio.value / own.value - 1
            if ratio.value >= NOTICED * own.value and share > slower.get(label, (0.0, ""))[0]:
                slower[label] = share, words
    if not slower:
        return []
    told = ", ".join(f"{label} {share:.0%} ({words})" for label, (share, words) in slower.items())
    return [f"Slower at batch 1 than {chosen}: {told}."]


@dataclass(frozen=True)
class Rates:
    """The trials of one candidate: (rate, metric), by rate. chosen: the rate that was taken."""

    label: str
    chosen: str
    trials: list[tuple[str, str]]


def rates(spec: PageSpec) -> list[Rates]:
    """What the search tried, candidate by candidate."""
    found = []
    for label, trials in spec.searched.items():
        taken = next(trial.learning_rate for trial in trials if trial.chosen)
        found.append(Rates(label, f"{taken:.3g}", shown(trials)))
    return found


def shown(trials: list[Trial]) -> list[tuple[str, str]]:
    ordered = sorted(trials, key=lambda trial: trial.learning_rate)
    return [
        (f"{trial.learning_rate:.3g}", "diverged" if trial.value is None else f"{trial.value:.4g}")
        for trial in ordered
    ]
