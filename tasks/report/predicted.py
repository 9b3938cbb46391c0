"""What was predicted of each candidate: beside what was measured, and for a larger base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.cost import Cost
from tasks.report.figures import Scale, figure, scale
from tasks.report.inputs import Inputs

Get = Callable[[Cost], float | None]

#: By the name of the figure: the predicted one.
PREDICTED: dict[str, Get] = {
    "trainable_parameters": lambda cost: cost.trainable_parameters,
    "train_peak_mib": lambda cost: cost.training_mib["total"] if cost.training_mib else None,
    "train_flops_per_token": lambda cost: cost.flops_per_token,
}
#: Those in which a larger base differs.
SIZES: dict[str, Get] = {
    "trainable_share": lambda cost: cost.trainable_share,
    "adapter_mib": lambda cost: cost.shipped_mib,
    **{name: PREDICTED[name] for name in ("train_peak_mib", "train_flops_per_token")},
}


@dataclass(frozen=True)
class Column:
    """A figure. unit: of all its cells."""

    name: str
    title: str
    unit: str


@dataclass(frozen=True)
class Pair:
    """Two values of a figure, and how they compare."""

    first: str
    second: str
    compared: str


@dataclass(frozen=True)
class Pairs:
    """A table. heads: of the three cells of each pair. rows: label, a pair for each column."""

    heads: tuple[str, str, str]
    columns: list[Column]
    rows: list[tuple[str, list[Pair]]]


def predicted(inputs: Inputs) -> Pairs | None:
    """What each trained candidate was expected to cost, and did; None where nothing was told."""
    costs = trained_costs(inputs, inputs.costs)
    found = {label: inputs.reports[label].figures() for label in costs}
    columns = {
        name: [(get(costs[label]), found[label].get(name)) for label in costs]
        for name, get in PREDICTED.items()
    }
    return pairs(("predicted", "measured", "%"), list(costs), columns, percent)


def on_larger(inputs: Inputs) -> Pairs | None:
    """What each trained candidate would cost here, and on the larger base."""
    here, there = trained_costs(inputs, inputs.costs), trained_costs(inputs, inputs.larger)
    labels = [label for label in here if label in there]
    columns = {
        name: [(get(here[label]), get(there[label])) for label in labels]
        for name, get in SIZES.items()
    }
    return pairs(("this base", "larger", "×"), labels, columns, times)


def trained_costs(inputs: Inputs, costs: dict[str, Cost]) -> dict[str, Cost]:
    """Those of the page's candidates that are trained, in its order."""
    known = (label for label in inputs.curves if label in costs)
    return {label: costs[label] for label in known if costs[label].trains}


def pairs(
    heads: tuple[str, str, str],
    labels: list[str],
    columns: dict[str, list[tuple[float | None, float | None]]],
    compare: Callable[[float, float], str],
) -> Pairs | None:
    """The table of figures by name, a pair for each label; None without labels."""
    if not labels:
        return None
    titles, cells = [], []
    for name, both in columns.items():
        kind, written = figure(name), written_as(name, [value for pair in both for value in pair])
        titles.append(Column(name, kind.title, written.unit))
        cells.append([pair(written, first, second, compare) for first, second in both])
    return Pairs(heads, titles, list(zip(labels, map(list, zip(*cells, strict=True)), strict=True)))


def written_as(name: str, values: Sequence[float | None]) -> Scale:
    if name == "trainable_parameters":  # exact, so every digit
        return Scale(1, "", 0)
    return scale(figure(name), [value for value in values if value is not None])


def pair(
    written: Scale,
    first: float | None,
    second: float | None,
    compare: Callable[[float, float], str],
) -> Pair:
    known = first is not None and second is not None
    one, other = ("–" if value is None else written.text(value) for value in (first, second))
    return Pair(one, other, compare(first or 0.0, second or 0.0) if known else "–")


def percent(told: float, found: float) -> str:
    """The difference of a prediction from what was measured, in per cent of that."""
    if not found:
        return "–"
    difference = 100 * (told / found - 1)
    return "0" if difference == 0 else f"{difference:+.1f}".replace("-", "−")


def times(here: float, there: float) -> str:
    return f"{there / here:.1f}" if here else "–"
