"""What was predicted of each candidate before it was trained, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from schemas.cost import Cost
from tasks.report.figures import Scale, figure, scale
from tasks.report.inputs import Inputs

#: By the name of the measured figure: the predicted one.
PREDICTED: dict[str, Callable[[Cost], float | None]] = {
    "trainable_parameters": lambda cost: cost.trainable_parameters,
    "train_peak_mib": lambda cost: cost.training_mib["total"] if cost.training_mib else None,
    "train_flops_per_token": lambda cost: cost.flops_per_token,
}


@dataclass(frozen=True)
class Column:
    """A figure. unit: of all its cells."""

    name: str
    title: str
    unit: str


@dataclass(frozen=True)
class Pair:
    """difference: of the prediction from the measurement, in percent of that."""

    predicted: str
    measured: str
    difference: str


@dataclass(frozen=True)
class Predicted:
    """rows: label, a pair for each column."""

    columns: list[Column]
    rows: list[tuple[str, list[Pair]]]


def predicted(inputs: Inputs) -> Predicted | None:
    """A row for each trained candidate; None where nothing was predicted."""
    costs = {label: cost for label, cost in inputs.costs.items() if cost.trains}
    costs = {label: costs[label] for label in inputs.curves if label in costs}
    if not costs:
        return None
    columns, cells = [], []
    for name, of in PREDICTED.items():
        told = [of(cost) for cost in costs.values()]
        found = [inputs.reports[label].figures().get(name) for label in costs]
        kind = figure(name)
        written = scale(kind, [value for value in [*told, *found] if value is not None])
        if name == "trainable_parameters":  # exact, so every digit
            written = Scale(1, "", 0)
        columns.append(Column(name, kind.title, written.unit))
        cells.append([pair(written, *both) for both in zip(told, found, strict=True)])
    return Predicted(columns, list(zip(costs, map(list, zip(*cells, strict=True)), strict=True)))


def pair(written: Scale, told: float | None, found: float | None) -> Pair:
    difference = "–"
    if told is not None and found:
        percent = 100 * (told / found - 1)
        difference = "0" if percent == 0 else f"{percent:+.1f}".replace("-", "−")
    words = ["–" if value is None else written.text(value) for value in (told, found)]
    return Pair(words[0], words[1], difference)
