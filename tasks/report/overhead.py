"""Inference overhead: the latencies of every subject, and the one ratio that stands for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from schemas.report import CriteriaReport, Interval, Latency
from tasks.report.figures import LATENCY, MS, OF_BASE, Figure, Scale, page_order, scale
from tasks.report.inputs import TITLES, Inputs

T = TypeVar("T")


@dataclass(frozen=True)
class LatencyCell:
    """name: the flat name of the figure. interval: in words, "" where there is none."""

    text: str
    value: float
    name: str
    interval: str = ""


@dataclass(frozen=True)
class LatencyRow:
    """cells: p50, p95 and ratio to the base of prefill, then of each token, if any is decoded."""

    prompt_tokens: str
    batch_size: int
    merged: str
    cells: list[LatencyCell]


@dataclass(frozen=True)
class LatencyGroup:
    subject: str
    rows: list[LatencyRow]


def latency_table(inputs: Inputs) -> list[LatencyGroup]:
    """The latencies of each subject by prompt length and batch size, unmerged before merged."""
    every = [row for report in inputs.reports.values() for row in report.inference_overhead]
    times = [time for row in every for time in (row.prefill_p50_ms, row.token_p50_ms) if time]
    ms = scale(Figure("", "overhead", "", MS, None), times)
    groups = []
    for name, report in inputs.reports.items():
        ordered = sorted(
            report.inference_overhead,
            key=lambda row: (row.prompt_tokens or 0, row.batch_size, row.merged),
        )
        rows = [
            LatencyRow(
                "–" if row.prompt_tokens is None else f"{row.prompt_tokens:,}",
                row.batch_size,
                "yes" if row.merged else "no",
                _cells(report, row, ms),
            )
            for row in ordered
        ]
        if rows:
            groups.append(LatencyGroup(TITLES.get(name, name), rows))
    return groups


def _cells(report: CriteriaReport, row: Latency, ms: Scale) -> list[LatencyCell]:
    tag = report.tag(row)
    ratio = Scale(1, OF_BASE[0][1], 2)
    found: list[tuple[Interval | float | None, Scale, str]] = [
        (row.prefill_p50_ms, ms, f"prefill_p50_ms_{tag}"),
        (row.prefill_p95_ms, ms, f"prefill_p95_ms_{tag}"),
        (row.prefill_ratio, ratio, f"prefill_ratio_{tag}"),
        (row.token_p50_ms, ms, f"token_p50_ms_{tag}"),
        (row.token_p95_ms, ms, f"token_p95_ms_{tag}"),
        (row.token_ratio, ratio, f"token_ratio_{tag}"),
    ]
    cells = []
    for value, written, name in found:
        if isinstance(value, Interval):
            own = value.low == value.high  # the base beside itself
            between = "" if own else f"{written.text(value.low)} – {written.text(value.high)}"
            cells.append(LatencyCell(written.text(value.value), value.value, name, between))
        elif value is not None:
            cells.append(LatencyCell(written.text(value), value, name))
    return cells


def overhead_figure(inputs: Inputs) -> str:
    """The ratio that stands for inference overhead: smallest batch, decoding where there is any.

    Prefill where a candidate has examples in front of its prompts: that is what they cost.
    By its unmerged name, for which `as_served` finds each subject's; "" where no latency was
    measured.
    """
    shown = any(report.method == "few_shot" for report in inputs.reports.values())
    first = "prefill" if shown else "token"
    names = {name for report in inputs.reports.values() for name in report.figures()}
    matches = [match for match in map(LATENCY.fullmatch, names) if match and match[2] == "ratio"]
    matches.sort(key=lambda match: (match[1] != first, bool(match[5]), page_order(match[0])))
    return matches[0][0] if matches else ""


def as_served(figures: Mapping[str, T], name: str, merges: bool) -> T | None:
    """A figure of a subject in the form that it would be served in: merged where the recipe merges
    and it was measured so. What was measured in one form alone (the finished model) has that one.
    """
    forms = (f"{name}_merged", name) if merges else (name, f"{name}_merged")
    return next((figures[form] for form in forms if form in figures), None)
