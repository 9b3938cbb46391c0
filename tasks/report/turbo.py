"""Turbo heads: how much faster the finished model writes with them, and how far they foresee."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.report import Interval, Speculation
from tasks.report.inputs import FINISHED, Inputs
from tasks.report.plots import COLOURS, Plot, layout, number


@dataclass(frozen=True)
class SpeedRow:
    """One batch size. rates: tokens a second of generate(), of the loop without drafts, and with
    heads. ratios: name of the figure, value in words, interval in words."""

    batch_size: int
    rates: list[str]
    ratios: list[tuple[str, str, str]]
    tokens_per_pass: str


@dataclass(frozen=True)
class TurboView:
    """summary: the first batch size in words. size: of the heads, in words."""

    summary: str
    size: str
    rows: list[SpeedRow]
    alike: str
    accepted: Plot


def turbo_view(inputs: Inputs) -> TurboView | None:
    """The section, or None for a finished model without heads."""
    finished = inputs.reports.get(FINISHED)
    found = None if finished is None else finished.speculation
    if found is None:
        return None
    first = found.speeds[0]
    faster = first.speedup.value
    summary = (
        f"At batch {first.batch_size} it writes {first.heads_tokens_per_s:,.0f} tokens a second, "
        f"{faster:.2f} × as many as transformers’ generate(), with "
        f"{first.tokens_per_pass:.2f} tokens a pass of the model."
    )
    size = (
        f"{found.heads} heads of rank {found.rank} and a state of {found.state}: "
        f"{found.parameters:,} parameters, 1/{found.medusa_parameters / found.parameters:.1f} of "
        f"those that as many heads of Medusa-1 would have, {found.stored_bytes / 2**20:,.2f} MiB."
    )
    alike = f"{found.alike:,} of {found.rows:,} answers are generate()’s, token for token." + (
        "" if found.alike == found.rows else _OTHERS
    )
    rows = [
        SpeedRow(
            speed.batch_size,
            [
                f"{rate:,.0f}"
                for rate in (
                    speed.generate_tokens_per_s,
                    speed.plain_tokens_per_s,
                    speed.heads_tokens_per_s,
                )
            ],
            [
                _ratio(f"speedup_b{speed.batch_size}", speed.speedup),
                _ratio(f"speculation_b{speed.batch_size}", speed.speculation),
            ],
            f"{speed.tokens_per_pass:.2f}",
        )
        for speed in found.speeds
    ]
    return TurboView(summary, size, rows, alike, _accepted(found))


_OTHERS = (
    " The others part where two tokens are nearly as likely: sums of another order round otherwise."
)


def _ratio(name: str, ratio: Interval) -> tuple[str, str, str]:
    return name, f"{ratio.value:.2f}", f"{ratio.low:.2f} – {ratio.high:.2f}"


def _accepted(found: Speculation) -> Plot:
    accepted = list(found.accepted)
    while len(accepted) > found.heads and accepted[-1] == 0:  # copies that were never right
        accepted.pop()
    depths = list(range(1, len(accepted) + 1))
    bars = {
        "type": "bar",
        "x": depths,
        "y": [number(100 * share) for share in accepted],
        "marker": {"color": COLOURS[0]},
        "hovertemplate": "%{y:.1f} % of the passes were right to depth %{x}<extra></extra>",
    }
    axes = layout("Tokens ahead", "Passes that were right so far (%)")
    axes["xaxis"] = axes.get("xaxis", {}) | {"dtick": 1}
    axes["yaxis"] = axes.get("yaxis", {}) | {"range": [0, 100]}
    words = ", ".join(f"{100 * share:.0f} %" for share in accepted)
    return Plot(
        id="plot-accepted",
        title="Drafts that were right",
        spoken=f"Share of passes whose drafts were right, from one token ahead: {words}.",
        note="Of the passes that had a draft so deep. Those deeper than the heads are copies of "
        "what stood in the text before.",
        spec={"data": [bars], "layout": axes | {"bargap": 0.4}},
    )
