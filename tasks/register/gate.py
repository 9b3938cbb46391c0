"""The gate: whether the figures of a report keep the bounds of a recipe."""

from __future__ import annotations

import difflib

from schemas.recipe import holds
from schemas.report import GateCheck, GateVerdict


def judge(bounds: dict[str, str], figures: dict[str, float]) -> GateVerdict:
    """Each bound with the figure that it met.

    A figure that the report does not have fails its bound: what was not measured was not shown.
    """
    checks = []
    for name, bound in bounds.items():
        value = figures.get(name)
        passed = value is not None and holds(bound, value)
        note = "" if value is not None else missing(name, figures)
        checks.append(GateCheck(figure=name, bound=bound, value=value, passed=passed, note=note))
    return GateVerdict(passed=all(check.passed for check in checks), checks=checks)


def missing(name: str, figures: dict[str, float]) -> str:
    """What to say of a figure that does not exist."""
    near = difflib.get_close_matches(name, figures, n=1)
    known = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(figures))}"
    return f"the report has no figure {name!r}; {known}"


def in_words(verdict: GateVerdict) -> str:
    """The bounds that failed, for a person; empty if none did."""
    failed = [check for check in verdict.checks if not check.passed]
    return "; ".join(
        check.note or f"{check.figure} is {check.value:.6g}, the bound is {check.bound}"
        for check in failed
    )
