"""The page's plots, as the JSON that plotly.js draws. Colours of text and grid are in page.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schemas.report import CurvePoint, DataReport, SplitReport
from schemas.stages import PageSpec
from tasks.report.figures import figure, scale
from tasks.report.inputs import BASE, FINISHED, Inputs
from tasks.report.pareto import Point, label_positions, pareto_front
from tasks.report.view import in_words, overhead_figure, quality_figure, subject_title

#: Okabe and Ito 2008, told apart with any colour vision; readable on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "triangle-up", "cross", "triangle-down", "pentagon")
GREY = "#808890"

#: Points of one curve that are drawn; longer ones are thinned evenly.
CURVE_POINTS = 1000

#: On a log axis where the largest value is this many times the smallest.
LOG_FROM = 20


@dataclass(frozen=True)
class Plot:
    """id: of its element. spoken: for a reader who does not see it. spec: data and layout."""

    id: str
    title: str
    spoken: str
    note: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Style:
    colour: str
    symbol: str
    dash: str


def styles(spec: PageSpec) -> dict[str, Style]:
    """One look for each subject in every plot; the finished model has its candidate's colour."""
    looks = {
        label: Style(
            COLOURS[i % len(COLOURS)],
            SYMBOLS[i % len(SYMBOLS)],
            DASHES[i // len(COLOURS) % len(DASHES)],
        )
        for i, label in enumerate(spec.labels)
    }
    looks[BASE] = Style(GREY, "x-thin-open", "dot")
    looks[FINISHED] = Style(looks[spec.selected].colour, "star", "solid")
    return looks


def pareto_plots(spec: PageSpec, inputs: Inputs) -> list[Plot]:
    """The goal's metric against one figure of each other criterion."""
    having = {name for label in spec.labels for name in inputs.reports[label].figures()}
    wanted = [
        ("storage", "shipped_bytes"),
        ("memory", "train_peak_mib" if "train_peak_mib" in having else "generate_peak_mib"),
        ("computation", "step_time_s" if "step_time_s" in having else "forward_flops_per_token"),
        ("overhead", overhead_figure(inputs) or ""),
        ("retention", "retention_change"),
    ]
    return [_pareto(key, name, spec, inputs) for key, name in wanted if name in having]


def _pareto(key: str, x_name: str, spec: PageSpec, inputs: Inputs) -> Plot:
    y_name = quality_figure(spec, inputs)
    names, xs, ys, bars = [], [], [], []
    for name, report in inputs.reports.items():
        x, y = report.figures().get(x_name), report.accuracy.metrics.get(y_name)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y.value):
            names.append(name)
            xs.append(x)
            ys.append(y.value)
            bars.append((y.low, y.high))
    tuned = [i for i, name in enumerate(names) if name != BASE]
    x_kind, y_kind = figure(x_name), figure(y_name)
    x_scale, y_scale = scale(x_kind, xs), scale(y_kind, ys)
    x = [value / x_scale.factor for value in xs]
    y = [value / y_scale.factor for value in ys]
    ends = [value / y_scale.factor for i in tuned for value in bars[i]]

    log = min(x[i] for i in tuned) > 0 and max(x[i] for i in tuned) >= LOG_FROM * min(
        x[i] for i in tuned
    )
    drawn = [i for i in range(len(names)) if not log or x[i] > 0]
    base_y = next((y[i] for i in drawn if names[i] == BASE), None)
    frame_y = _frame(ends)
    base_inside = base_y is not None and _near(base_y, ends)
    if base_inside and base_y is not None:
        frame_y = _frame([*ends, base_y])
    inside = [i for i in drawn if names[i] != BASE or base_inside]
    frame_x = _frame([math.log10(x[i]) if log else x[i] for i in inside], 0.16)

    front = pareto_front([(x[i], y[i]) for i in tuned], higher_is_better=y_kind.better != "lower")
    looks = styles(spec)
    titles = [subject_title(name) if name != BASE else "base" for name in names]
    shares: list[Point] = [
        (
            _share(math.log10(x[i]) if log else x[i], frame_x),
            _share(y[i], frame_y),
        )
        for i in drawn
    ]
    positions = label_positions(shares, [titles[i] for i in drawn])
    unit = f" ({x_scale.unit})" if x_scale.unit else ""
    y_unit = f" ({y_scale.unit})" if y_scale.unit else ""
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [_short(x[tuned[i]]) for i in front],
            "y": [_short(y[tuned[i]]) for i in front],
            "line": {"shape": "hv", "color": GREY, "width": 1.5, "dash": "dot"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    for i, position in zip(drawn, positions, strict=True):
        look = looks[names[i]]
        low, high = (value / y_scale.factor for value in bars[i])
        interval = f"{y_scale.text(bars[i][0])} to {y_scale.text(bars[i][1])}"
        traces.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "name": titles[i],
                "x": [_short(x[i])],
                "y": [_short(y[i])],
                "text": [titles[i]],
                "textposition": position,
                "cliponaxis": False,
                "error_y": {
                    "type": "data",
                    "array": [_short(max(high - y[i], 0))],
                    "arrayminus": [_short(max(y[i] - low, 0))],
                    "thickness": 1.25,
                    "width": 4,
                },
                "marker": {
                    "color": look.colour,
                    "symbol": look.symbol,
                    "size": 11,
                    "line": {"width": 2 if names[i] == BASE else 0, "color": look.colour},
                },
                "hovertemplate": f"<b>{titles[i]}</b><br>{y_kind.title} {in_words(y_name, ys[i])}"
                f"<br>95 % interval {interval}<br>{x_kind.title} {in_words(x_name, xs[i])}"
                "<extra></extra>",
                "showlegend": False,
            }
        )
    notes = []
    if base_y is not None and not base_inside:
        notes.append(f"The base, at {y_scale.text(base_y * y_scale.factor)}{_tail(y_scale.unit)}, "
                     "is outside; double-click to see it.")
    absent = [subject_title(name) for name in inputs.reports if name not in names and name != BASE]
    if absent:
        notes.append(f"Not measured for: {', '.join(absent)}.")
    layout = _layout(f"{x_kind.title}{unit}", f"{y_kind.title}{y_unit}")
    layout["xaxis"] |= {"type": "log" if log else "linear", "range": [_short(v) for v in frame_x]}
    if log:
        layout["xaxis"] |= {"dtick": "D1" if frame_x[1] - frame_x[0] < 1.2 else 1}
    layout["yaxis"]["range"] = [_short(value) for value in frame_y]
    spoken = "; ".join(
        f"{titles[i]}: {in_words(x_name, xs[i])}, {in_words(y_name, ys[i])}" for i in drawn
    )
    return Plot(
        id=f"plot-pareto-{key}",
        title=f"{y_kind.title} against {PARETO_TITLES[key]}",
        spoken=f"{y_kind.title} against {x_kind.title.lower()}. {spoken}.",
        note=" ".join(notes),
        spec={"data": traces, "layout": layout},
    )


PARETO_TITLES = {
    "storage": "storage",
    "memory": "memory",
    "computation": "computation",
    "overhead": "inference overhead",
    "retention": "forgetting",
}


def _tail(unit: str) -> str:
    return f"\u00a0{unit}" if unit else ""


def _near(value: float, others: Sequence[float]) -> bool:
    """Whether a frame with `value` still shows what is between the others."""
    return max(*others, value) - min(*others, value) <= 3 * (max(others) - min(others))


def _frame(values: Sequence[float], margin: float = 0.12) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * margin or abs(high) * margin or margin
    return low - pad, high + pad


def _share(value: float, frame: tuple[float, float]) -> float:
    return (value - frame[0]) / (frame[1] - frame[0])


def loss_plot(spec: PageSpec, inputs: Inputs) -> Plot | None:
    """The training loss of every candidate: each step faintly, its running mean clearly."""
    looks = styles(spec)
    traces: list[dict[str, Any]] = []
    spoken = []
    for label, curve in inputs.curves.items():
        if not curve:
            continue
        look = looks[label]
        loss = np.array([point.loss for point in curve])
        smooth = running_mean(loss, window=max(1, len(curve) // 25))
        kept = thinned(len(curve))
        axes = _curve_axes(curve, kept)
        shared = {
            "type": "scatter",
            "mode": "lines",
            "x": axes["step"],
            "meta": axes,
            "legendgroup": label,
        }
        traces.append(
            shared
            | {
                "y": [_number(loss[i]) for i in kept],
                "line": {"color": look.colour, "width": 1},
                "opacity": 0.3,
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
        traces.append(
            shared
            | {
                "name": label,
                "y": [_number(smooth[i]) for i in kept],
                "line": {"color": look.colour, "width": 2.25, "dash": look.dash},
                "customdata": [
                    [_short(curve[i].loss), _short(curve[i].learning_rate), _short(curve[i].grad_norm)]
                    for i in kept
                ],
                "hovertemplate": "%{y:.4f} (this step %{customdata[0]:.4f}, learning rate "
                "%{customdata[1]:.2e}, gradient norm %{customdata[2]:.3g})",
            }
        )
        spoken.append(f"{label}: {loss[0]:.3f} at the first step, {smooth[-1]:.3f} at the end")
    if not traces:
        return None
    unit = "nats a row" if inputs.data.task == "sequence-classification" else "nats an answer token"
    layout = _layout("Optimiser step", f"Training loss ({unit})")
    layout["hovermode"] = "x unified"
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return Plot(
        id="plot-loss",
        title="Training loss",
        spoken="Training loss. " + "; ".join(spoken) + ".",
        note="",
        spec={"data": traces, "layout": layout},
    )


def _curve_axes(curve: list[CurvePoint], kept: list[int]) -> dict[str, list[float]]:
    """What a curve can be drawn over: steps, tokens, or seconds of training."""
    seconds = np.cumsum([point.step_time_s for point in curve])
    return {
        "step": [curve[i].step for i in kept],
        "tokens": [curve[i].tokens for i in kept],
        "seconds": [_short(float(seconds[i])) for i in kept],
    }


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and the `window - 1` before it (of as many as there are)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - window, 0)
    return (total[last] - total[first]) / (last - first)


def thinned(count: int) -> list[int]:
    """At most CURVE_POINTS indices of `count`, evenly, the first and the last among them."""
    if count <= CURVE_POINTS:
        return list(range(count))
    return sorted({round(i) for i in np.linspace(0, count - 1, CURVE_POINTS)})


def length_plots(data: DataReport) -> list[Plot]:
    """A histogram of row lengths for each split."""
    return [_lengths(name, split, data) for name, split in data.splits.items() if split.rows_kept]


def _lengths(name: str, split: SplitReport, data: DataReport) -> Plot:
    edges, counts = split.lengths.edges, split.lengths.counts
    widths = [right - left for left, right in zip(edges, edges[1:], strict=False)]
    centres = [left + width / 2 for left, width in zip(edges, widths, strict=False)]
    bars = {
        "type": "bar",
        "x": centres,
        "y": counts,
        "width": widths,
        "marker": {"color": COLOURS[0], "line": {"width": 0}},
        "customdata": [
            [left, right - 1] for left, right in zip(edges, edges[1:], strict=False)
        ],
        "hovertemplate": "%{customdata[0]} to %{customdata[1]} tokens: %{y:,} rows<extra></extra>",
    }
    layout = _layout("Tokens", "Rows")
    layout["bargap"] = 0
    return Plot(
        id=f"plot-lengths-{name}",
        title=f"Row lengths, {name}",
        spoken=f"Row lengths of {name}: {split.rows_kept} rows, {split.tokens} tokens, "
        f"from {edges[0]} to below {edges[-1]} tokens a row.",
        note="",
        spec={"data": [bars], "layout": layout},
    )


def _layout(x_title: str, y_title: str) -> dict[str, Any]:
    axis = {"zeroline": False, "automargin": True, "showline": True, "ticks": "outside"}
    axis |= {"ticklen": 4, "gridwidth": 1, "exponentformat": "power"}
    return {
        "xaxis": axis | {"title": {"text": x_title, "standoff": 8}, "showgrid": False},
        "yaxis": axis | {"title": {"text": y_title, "standoff": 8}, "showline": False, "ticks": ""},
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "font": {"size": 12, "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        "dragmode": "zoom",
    }


def _short(value: float) -> float:
    """Six significant digits: no eye sees more, and the page stays small."""
    return float(f"{value:.6g}")


def _number(value: float) -> float | None:
    """For JSON, which has no NaN: a gap in the curve."""
    return _short(float(value)) if math.isfinite(value) else None
