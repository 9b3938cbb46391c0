"""The goal's metric against one figure of each other criterion, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from schemas.report import RETENTION, Interval
from schemas.stages import PageSpec
from tasks.report.figures import figure, in_words, scale
from tasks.report.inputs import BASE, TITLES, Inputs
from tasks.report.overhead import as_served, overhead_figure
from tasks.report.pareto import joined_labels, label_positions, pareto_front
from tasks.report.plots import GREY, Plot, Style, layout, numbers, short, styles
from tasks.report.summary import quality_figure

AGAINST = {
    "storage": "storage",
    "memory": "memory",
    "computation": "computation",
    "overhead": "inference overhead",
    "retention": "forgetting",
}

#: A log axis where the largest value is this many times the smallest.
LOG_FROM = 20

Range = tuple[float, float]


@dataclass(frozen=True)
class Subject:
    """One point, unrounded and in the figures' own units."""

    name: str
    x: float
    y: Interval


def trade_offs(spec: PageSpec, inputs: Inputs) -> list[Plot]:
    """One plot for each criterion of which the candidates have a figure."""
    y_name = quality_figure(spec, inputs)
    return [
        _plot(
            criterion,
            f"{figure(y_name).title} against {AGAINST[criterion]}",
            (x_name, y_name),
            spec,
            inputs,
        )
        for criterion, x_name in compared(spec, inputs).items()
    ]


def other_pairs(spec: PageSpec, inputs: Inputs) -> list[Plot]:
    """The criteria other than the goal's metric against each other, two by two."""
    pairs = combinations(compared(spec, inputs).items(), 2)
    return [
        _plot(
            f"{one}-{other}",
            f"{AGAINST[other].capitalize()} against {AGAINST[one]}",
            (x_name, y_name),
            spec,
            inputs,
        )
        for (one, x_name), (other, y_name) in pairs
    ]


def compared(spec: PageSpec, inputs: Inputs) -> dict[str, str]:
    """Criterion: the figure that stands for it, where the candidates have one."""
    having = {name for label in spec.labels for name in inputs.reports[label].figures()}
    wanted = {
        "storage": "shipped_bytes",
        "memory": "train_peak_mib" if "train_peak_mib" in having else "generate_peak_mib",
        "computation": "step_time_s" if "step_time_s" in having else "forward_flops_per_token",
        "overhead": overhead_figure(inputs),
        "retention": RETENTION,
    }
    return {criterion: name for criterion, name in wanted.items() if name in having}


def _subjects(x_name: str, y_name: str, inputs: Inputs, merges: bool) -> list[Subject]:
    points = []
    for name, report in inputs.reports.items():
        flat = report.figures()
        x, y = as_served(flat, x_name, merges), report.accuracy.intervals().get(y_name)
        if y is None and (value := as_served(flat, y_name, merges)) is not None:
            y = Interval(value=value, low=value, high=value)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y.value):
            points.append(Subject(name, x, y))
    return points


def _plot(key: str, title: str, names: tuple[str, str], spec: PageSpec, inputs: Inputs) -> Plot:
    x_name, y_name = names
    points, looks = _subjects(x_name, y_name, inputs, spec.merges), styles(spec)
    shown = numbers(spec)
    x_kind, y_kind = figure(x_name), figure(y_name)
    x_scale = scale(x_kind, [point.x for point in points])
    y_scale = scale(y_kind, [point.y.value for point in points])
    tuned = [point for point in points if point.name != BASE]
    smallest, largest = min(point.x for point in tuned), max(point.x for point in tuned)
    log = smallest > 0 and largest >= LOG_FROM * smallest

    ends = [end / y_scale.factor for point in tuned for end in (point.y.low, point.y.high)]
    base = next((point for point in points if point.name == BASE), None)
    drawn = [point for point in points if not log or point.x > 0]
    base_y = base.y.value / y_scale.factor if base else ends[0]
    base_inside = base in drawn and _fits(base_y, ends)
    frame_y = _frame([*ends, base_y] if base_inside else ends, 0.12)
    inside = drawn if base_inside else tuned

    def along(point: Subject) -> float:
        x = point.x / x_scale.factor
        return math.log10(x) if log else x

    frame_x = _frame([along(point) for point in inside], 0.16)
    places = [
        (_share(along(point), frame_x), _share(point.y.value / y_scale.factor, frame_y))
        for point in drawn
    ]
    labels = joined_labels(places, [shown.get(point.name, _title(point.name)) for point in drawn])
    positions = label_positions(places, labels)

    best_first = y_kind.better != "lower"
    front = pareto_front([(point.x, point.y.value) for point in tuned], higher_is_better=best_first)
    traces = [_front_trace([tuned[i] for i in front], x_scale.factor, y_scale.factor)]
    for point, label, position in zip(drawn, labels, positions, strict=True):
        trace = _point_trace(point, x_scale.factor, y_scale.factor, looks[point.name])
        interval = f"{y_scale.text(point.y.low)} to {y_scale.text(point.y.high)}"
        traces.append(
            trace
            | {
                "text": [label],
                "textposition": position,
                "hovertemplate": f"<b>{_title(point.name)}</b><br>"
                f"{y_kind.title} {in_words(y_name, point.y.value)}<br>"
                + (f"95 % interval {interval}<br>" if point.y.low < point.y.high else "")
                + f"{x_kind.title} {in_words(x_name, point.x)}<extra></extra>",
            }
        )

    looks_of_axes = layout(_axis(x_kind.title, x_scale.unit), _axis(y_kind.title, y_scale.unit))
    looks_of_axes["xaxis"]["range"] = [short(end) for end in frame_x]
    looks_of_axes["yaxis"]["range"] = [short(end) for end in frame_y]
    if log:
        looks_of_axes["xaxis"] |= {"type": "log", "tickvals": _log_ticks(frame_x)}
    spoken = "; ".join(
        f"{_title(point.name)}: {in_words(x_name, point.x)}, {in_words(y_name, point.y.value)}"
        for point in drawn
    )
    return Plot(
        id=f"plot-{key}",
        title=title,
        spoken=f"{y_kind.title} against {x_kind.title.lower()}. {spoken}.",
        note=_note(y_name, base, base_inside, base in drawn, points, inputs),
        spec={"data": traces, "layout": looks_of_axes},
    )


def _front_trace(front: list[Subject], x_factor: float, y_factor: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [short(point.x / x_factor) for point in front],
        "y": [short(point.y.value / y_factor) for point in front],
        "line": {"shape": "hv", "color": GREY, "width": 1.5, "dash": "dot"},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _point_trace(point: Subject, x_factor: float, y_factor: float, look: Style) -> dict[str, Any]:
    y = point.y
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": _title(point.name),
        "x": [short(point.x / x_factor)],
        "y": [short(y.value / y_factor)],
        "error_y": {
            "type": "data",
            "array": [short(max(y.high - y.value, 0) / y_factor)],
            "arrayminus": [short(max(y.value - y.low, 0) / y_factor)],
            "thickness": 1.25,
            "width": 4,
        },
        "marker": {
            "color": look.colour,
            "symbol": look.symbol,
            "size": 11,
            "line": {"width": 2 if point.name == BASE else 0, "color": look.colour},
        },
        "showlegend": False,
    }


def _note(
    y_name: str,
    base: Subject | None,
    base_inside: bool,
    base_drawn: bool,
    points: list[Subject],
    inputs: Inputs,
) -> str:
    notes = []
    if base and not base_inside:
        how = "; double-click to see it" if base_drawn else ""
        notes.append(f"The base, at {in_words(y_name, base.y.value)}, is outside{how}.")
    shown = {point.name for point in points}
    absent = [name for name in inputs.reports if name not in shown and name != BASE]
    if absent:
        notes.append(f"Not measured for {', '.join(map(_title, absent))}.")
    return " ".join(notes)


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _axis(title: str, unit: str) -> str:
    return f"{title} ({unit})" if unit else title


def _fits(value: float, others: Sequence[float]) -> bool:
    """Whether a frame with `value` still shows what is between the others."""
    return max(*others, value) - min(*others, value) <= 3 * (max(others) - min(others))


def _frame(values: Sequence[float], margin: float) -> Range:
    low, high = min(values), max(values)
    pad = (high - low) * margin or abs(high) * margin or margin
    return low - pad, high + pad


def _share(value: float, frame: Range) -> float:
    return (value - frame[0]) / (frame[1] - frame[0])


def _log_ticks(frame: Range) -> list[float]:
    """1, 2, 5 and their tens; the tens alone where these would crowd. frame: in powers of ten."""
    leads = (1, 2, 5) if frame[1] - frame[0] < 2.5 else (1,)
    powers = range(math.floor(frame[0]), math.ceil(frame[1]) + 1)
    return [float(f"{lead}e{power}") for power in powers for lead in leads]
