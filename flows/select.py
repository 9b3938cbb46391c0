"""Which candidate goes on to be finished. Comparisons, no maths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from schemas.errors import StageError, UserError
from schemas.recipe import Select
from tasks.register.gate import in_words, judge

Figures = dict[str, float]


@dataclass(frozen=True)
class Choice:
    """The selected candidate, the reason in words, and the figure that it was chosen by."""

    label: str
    why: str
    goal: str


def choose(select: Select, figures: dict[str, Figures]) -> Choice:
    """The best candidate that keeps every bound. Of equals, the one named first in the recipe.

    Raises:
        UserError: a figure that no candidate has, with the figures that exist.
        StageError: no candidate keeps the bounds, with what each one broke.
    """
    goal = select.maximize or select.minimize
    assert goal is not None
    known = sorted({name for found in figures.values() for name in found})
    for name in [goal, *select.subject_to]:
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
    return Choice(best, _words(select, goal, best, fitting, broken), goal)


def _words(
    select: Select,
    goal: str,
    best: str,
    fitting: dict[str, Figures],
    broken: dict[str, str],
) -> str:
    end = "highest" if select.maximize else "lowest"
    text = f"{best} has the {end} {goal}, {_number(fitting[best][goal])}"
    others = {label: found[goal] for label, found in fitting.items() if label != best}
    if others:
        text += " (" + ", ".join(f"{label} {_number(value)}" for label, value in others.items())
        text += ")"
    bounds = " and ".join(f"{name} {bound}" for name, bound in select.subject_to.items())
    if bounds:
        text += f", among those with {bounds}"
    left_out = [f"{label} ({why})" for label, why in broken.items() if why]
    if left_out:
        text += "; left out: " + ", ".join(left_out)
    return text


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
