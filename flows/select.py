"""Which candidate goes on, and whether the finished model keeps the gate's bounds."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import StageError, UserError
from schemas.recipe import Select, holds
from schemas.report import GateCheck, GateVerdict

Figures = dict[str, float]


@dataclass(frozen=True)
class Choice:
    """The selected candidate and the reason, in words."""

    label: str
    why: str


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
    broken = {label: breaches(select.subject_to, found) for label, found in figures.items()}
    fitting = {
        label: figures[label] for label in figures if not broken[label] and goal in figures[label]
    }
    if not fitting:
        lines = [
            f"    {label}: {'; '.join(broken[label]) or f'has no {goal}'}" for label in figures
        ]
        raise StageError("no candidate keeps the bounds of `select`:\n" + "\n".join(lines))
    sign = 1 if select.maximize else -1
    best = max(fitting, key=lambda label: sign * fitting[label][goal])
    return Choice(best, _words(select, goal, best, fitting, broken))


def breaches(bounds: dict[str, str], figures: Figures) -> list[str]:
    """The bounds that are not kept, in words. A figure that is missing keeps none."""
    return [
        f"{check.figure} = {_number(check.value)}, wanted {check.bound}"
        for check in judge(bounds, figures).checks
        if not check.passed
    ]


def judge(bounds: dict[str, str], figures: Figures) -> GateVerdict:
    """Each bound with the figure it met."""
    checks = []
    for name, bound in bounds.items():
        value = figures.get(name)
        passed = value is not None and holds(bound, value)
        checks.append(GateCheck(figure=name, bound=bound, value=value, passed=passed))
    return GateVerdict(passed=all(check.passed for check in checks), checks=checks)


def _words(
    select: Select,
    goal: str,
    best: str,
    fitting: dict[str, Figures],
    broken: dict[str, list[str]],
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
    left_out = [f"{label} ({'; '.join(why)})" for label, why in broken.items() if why]
    if left_out:
        text += "; left out: " + ", ".join(left_out)
    return text


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
