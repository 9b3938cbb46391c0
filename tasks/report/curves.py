"""The loss of every candidate while it was trained."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.report import CurvePoint
from schemas.stages import PageSpec
from schemas.tasks import TASKS
from tasks.report.inputs import Inputs
from tasks.report.plots import Plot, Style, layout, number, short, styles

#: Points of one curve that are drawn; longer ones are thinned evenly.
CURVE_POINTS = 1000


def loss_plot(spec: PageSpec, inputs: Inputs) -> Plot | None:
    """Each step faintly, the mean of those around it clearly. None where nothing was trained."""
    looks = styles(spec)
    traces: list[dict[str, Any]] = []
    spoken = []
    for label, curve in inputs.curves.items():
        if curve:
            loss = np.array([point.loss for point in curve])
            smooth = running_mean(loss, radius=len(curve) // 50)
            traces += _traces(label, curve, smooth, looks[label])
            spoken.append(f"{label}: from {loss[0]:.3f} to {smooth[-1]:.3f}")
    if not traces:
        return None
    unit = "nats a row" if TASKS[inputs.data.task].labels == "row" else "nats a token"
    axes = layout("Optimiser step", f"Training loss ({unit})")
    axes["hovermode"] = "x unified"
    # Below: above, many names run into the buttons.
    axes["legend"] = {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}
    axes["showlegend"] = True
    return Plot(
        id="plot-loss",
        title="Training loss",
        spoken=f"Training loss. {'; '.join(spoken)}.",
        note="Faint: every step. Clear: the mean of the steps around it.",
        spec={"data": traces, "layout": axes},
    )


def _traces(
    label: str, curve: list[CurvePoint], smooth: NDArray[np.float64], look: Style
) -> list[dict[str, Any]]:
    kept = thinned(len(curve))
    axes = curve_axes(curve, kept)
    shared = {
        "type": "scatter",
        "mode": "lines",
        "x": axes["step"],
        "meta": axes,
        "legendgroup": label,
    }
    every_step = {
        "y": [number(curve[i].loss) for i in kept],
        "line": {"color": look.colour, "width": 1},
        "opacity": 0.35,
        "hoverinfo": "skip",
        "showlegend": False,
    }
    clear = {
        "name": label,
        "y": [number(smooth[i]) for i in kept],
        "line": {"color": look.colour, "width": 2, "dash": look.dash},
        "customdata": [
            [number(curve[i].loss), short(curve[i].learning_rate), number(curve[i].grad_norm)]
            for i in kept
        ],
        "hovertemplate": "%{y:.4f} (this step %{customdata[0]:.4f}, learning rate "
        "%{customdata[1]:.2e}, gradient norm %{customdata[2]:.3g})",
    }
    return [shared | every_step, shared | clear]


def curve_axes(curve: list[CurvePoint], kept: list[int]) -> dict[str, list[float]]:
    """What a curve can be drawn over: steps, tokens, or seconds of training."""
    seconds = np.cumsum([point.step_time_s for point in curve])
    return {
        "step": [curve[i].step for i in kept],
        "tokens": [curve[i].tokens for i in kept],
        "seconds": [short(float(seconds[i])) for i in kept],
    }


def running_mean(values: NDArray[np.float64], radius: int) -> NDArray[np.float64]:
    """The mean of each value, [N], and up to `radius` on either side: as many on both."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(radius, np.minimum(place, len(values) - 1 - place))
    mean: NDArray[np.float64] = (total[place + reach + 1] - total[place - reach]) / (2 * reach + 1)
    return mean


def thinned(count: int) -> list[int]:
    """At most CURVE_POINTS indices of `count`, evenly, the first and the last among them."""
    if count <= CURVE_POINTS:
        return list(range(count))
    return sorted({round(i) for i in np.linspace(0, count - 1, CURVE_POINTS)})
