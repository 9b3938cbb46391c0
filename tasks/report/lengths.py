"""How long the rows of each split are."""

from __future__ import annotations

from itertools import pairwise

from schemas.report import DataReport, SplitReport
from schemas.tasks import reads_images
from tasks.report.plots import COLOURS, Plot, layout


def length_plots(data: DataReport) -> list[Plot]:
    """A histogram for each split that has rows. Images have one length, which is told in words."""
    if reads_images(data.task):
        return []
    return [_lengths(name, split) for name, split in data.splits.items() if split.rows_kept]


def _lengths(name: str, split: SplitReport) -> Plot:
    bins = list(pairwise(split.lengths.edges))
    bars = {
        "type": "bar",
        "x": [(left + right) / 2 for left, right in bins],
        "y": split.lengths.counts,
        "width": [right - left for left, right in bins],
        "marker": {"color": COLOURS[0], "line": {"width": 0}},
        "customdata": [[left, right - 1] for left, right in bins],
        "hovertemplate": "%{customdata[0]} to %{customdata[1]} tokens: %{y:,} rows<extra></extra>",
    }
    mean = split.tokens / split.rows_kept
    return Plot(
        id=f"plot-lengths-{name}",
        title=f"Row lengths, {name}",
        spoken=f"Row lengths of {name}: {split.rows_kept:,} rows of {mean:,.0f} tokens on average.",
        note=f"{mean:,.0f} tokens a row on average.",
        spec={"data": [bars], "layout": layout("Tokens", "Rows") | {"bargap": 0}},
    )
