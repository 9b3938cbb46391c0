"""Which candidate goes on to be finished, and why. Comparisons, no maths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from schemas.errors import StageError, UserError
from schemas.recipe import Select
from schemas.report import Comparison
from tasks.core.apart import told_apart
from tasks.register.gate import in_words, judge

Figures = dict[str, float]

#: As many other candidates have their figures in the reason; more are in the table.
NAMED = 4


@dataclass(frozen=True)
class Choice:
    """The selected candidate, the reason in words, and the figure that it was chosen by."""

    label: str
    why: str
    goal: str


def choose(
    select: Select, figures: dict[str, Figures], comparison: Comparison | None = None
) -> Choice:
    """The best candidate that keeps every bound; with `prefer`, of those that are not told apart
    from it the one with the least of that figure. Of equals, the one named first in the recipe.

    Raises:
        UserError: a figure that no candidate has, with the figures that exist.
        StageError: no candidate keeps the bounds, with what each one broke.
    """
    goal = select.maximize or select.minimize
    assert goal is not None
    known = sorted({name for found in figures.values() for name in found})
    for name in filter(None, [goal, select.prefer, *select.subject_to]):
        if name not in known:
            raise UserError.at(
                "recipe select",
                f"no candidate's report has the figure {name!r}",
                f"choose one of: {', '.join(known)}",
            )
    broken = {label: in_words(judge(select.subject_to, found)) for label, found in figures.items()}
    fitting = {
        label: found
        for label, found in figures.items()
        if not broken[label] and not math.isnan(found.get(goal, math.nan))
    }
    if not fitting:
        lines = [f"    {label}: {broken[label] or f'has no {goal}'}" for label in figures]
        raise StageError("no candidate keeps the bounds of `select`:\n" + "\n".join(lines))
    sign = 1 if select.maximize else -1
    best = max(fitting, key=lambda label: sign * fitting[label][goal])
    equal = equals_of(best, goal, fitting, comparison)
    chosen = best
    if select.prefer is not None:
        least = {label: fitting[label].get(select.prefer, math.inf) for label in [best, *equal]}
        chosen = min(least, key=lambda label: least[label])
    return Choice(chosen, _words(select, goal, best, chosen, equal, fitting, broken), goal)


def equals_of(
    best: str, goal: str, fitting: dict[str, Figures], comparison: Comparison | None
) -> list[str]:
    """Who of those that fit is not told apart from their best."""
    if comparison is None or comparison.metric != goal:
        return []
    tests = told_apart(comparison, best, [label for label in fitting if label != best])
    return [test.label for test in tests if not test.apart]


def _words(
    select: Select,
    goal: str,
    best: str,
    chosen: str,
    equal: list[str],
    fitting: dict[str, Figures],
    broken: dict[str, str],
) -> str:
    end = "highest" if select.maximize else "lowest"
    if chosen == best:
        text = f"{best} has the {end} {goal}, {_number(fitting[best][goal])}"
    else:
        text = _preferred(select, goal, best, chosen, fitting)
    others = {label: found[goal] for label, found in fitting.items() if label != chosen}
    if 0 < len(others) <= NAMED:
        text += " (" + ", ".join(f"{label} {_number(value)}" for label, value in others.items())
        text += ")"
    bounds = " and ".join(f"{name} {bound}" for name, bound in select.subject_to.items())
    if bounds:
        text += f", among those with {bounds}"
    if chosen == best and equal:
        text += f"; not told apart from it on these rows: {', '.join(equal)}"
    left_out = [f"{label} ({why})" for label, why in broken.items() if why]
    if left_out:
        text += "; left out: " + ", ".join(left_out)
    return text


def _preferred(
    select: Select, goal: str, best: str, chosen: str, fitting: dict[str, Figures]
) -> str:
    """`lora-r8: accuracy 0.93, not told apart from the best (full, 0.931), at 1/40 of its …`."""
    own, top = fitting[chosen], fitting[best]
    assert select.prefer is not None
    least, most = own[select.prefer], top.get(select.prefer, math.nan)
    share = f"{least / most:.0%} of its" if most else "less"
    return (
        f"{chosen} has the {goal} {_number(own[goal])}, not told apart from the best ({best}, "
        f"{_number(top[goal])}), at {share} {select.prefer}"
    )


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
