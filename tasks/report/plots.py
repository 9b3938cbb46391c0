"""What all plots share: their looks, and the JSON that plotly.js draws.

Colours of text, axes and grid are in page.css, so that light, dark and paper need no script.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from schemas.stages import PageSpec
from tasks.report.inputs import BASE, FINISHED

#: Okabe and Ito 2008, told apart with any colour vision; readable on white and on near-black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "triangle-up", "cross", "triangle-down", "pentagon")
GLYPHS = dict(zip(SYMBOLS, "●■▲✚▼⬟", strict=True))
GREY = "#808890"
#: More candidates than this are numbered where their names would cover one another.
FEW = 6


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

    @property
    def glyph(self) -> str:
        return GLYPHS[self.symbol]


def styles(spec: PageSpec) -> dict[str, Style]:
    """One look for each subject in every plot; the finished model has its candidate's colour."""
    looks = {
        label: Style(
            COLOURS[i % len(COLOURS)],
            SYMBOLS[(i + i // len(COLOURS)) % len(SYMBOLS)],
            DASHES[i // len(COLOURS) % len(DASHES)],
        )
        for i, label in enumerate(spec.labels)
    }
    looks[BASE] = Style(GREY, "x-thin-open", "dot")
    looks[FINISHED] = Style(looks[spec.selected].colour, "star", "solid")
    return looks


def numbers(spec: PageSpec) -> dict[str, str]:
    """Candidate: what stands for its name in a plot; empty where the names themselves do."""
    if len(spec.labels) <= FEW:
        return {}
    return {label: str(number) for number, label in enumerate(spec.labels, start=1)}


def layout(x_title: str, y_title: str) -> dict[str, Any]:
    """The layout that every plot starts from."""
    axis = {
        "zeroline": False,
        "automargin": True,
        "exponentformat": "power",
        "title": {"standoff": 8},
        "ticklen": 4,
    }
    family = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
    x_axis = axis | {"title": {"text": x_title, "standoff": 8}, "showgrid": False}
    y_axis = axis | {"title": {"text": y_title, "standoff": 8}}
    return {
        "xaxis": x_axis | {"showline": True, "ticks": "outside"},
        "yaxis": y_axis,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "font": {"size": 12, "family": family},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": COLOURS[0]},
        "hoverlabel": {"font": {"family": family}},
        "dragmode": "zoom",
    }


def short(value: float) -> float:
    """Six significant digits: no eye sees more, and the page stays small."""
    return float(f"{value:.6g}")


def number(value: float) -> float | None:
    """For JSON, which has no NaN: a gap in the curve."""
    return short(float(value)) if math.isfinite(value) else None
