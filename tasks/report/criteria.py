"""The table of the five criteria: a row for each figure, a column for each subject."""

from __future__ import annotations

from dataclasses import dataclass, replace

from schemas.report import Interval
from schemas.stages import PageSpec
from tasks.report.figures import CRITERIA, LATENCY, Figure, figure, page_order, scale
from tasks.report.inputs import TITLES, Inputs
from tasks.report.overhead import as_served, overhead_figure
from tasks.report.plots import numbers
from tasks.report.summary import quality_figure

#: The same figure in another unit: shown once, in the row of the other.
SAME = {"adapter_mib": "shipped_bytes"}
#: Between the goal's metric and inference overhead.
AT_A_GLANCE = (
    "retention_change",
    "shipped_bytes",
    "trainable_share",
    "train_peak_mib",
    "flops_ratio_to_full",
    "step_time_s",
)


@dataclass(frozen=True)
class Cell:
    """value: unrounded, for machines. mark: best or worst of the candidates."""

    value: float
    text: str
    interval: str | None
    mark: str | None


@dataclass(frozen=True)
class Row:
    """One figure of every subject. names: as `select` and the gate write it."""

    names: str
    title: str
    unit: str
    better: str | None
    cells: list[Cell | None]


@dataclass(frozen=True)
class Group:
    criterion: str
    title: str
    rows: list[Row]


@dataclass(frozen=True)
class How:
    """How a criterion was measured; lines: (subjects, words), no subjects where all agree."""

    criterion: str
    title: str
    lines: list[tuple[str, str]]


def criteria_table(inputs: Inputs, labels: list[str]) -> list[Group]:
    """Every figure by criterion, but for milliseconds: those are in the table of latencies."""
    flat = {name: report.figures() for name, report in inputs.reports.items()}
    between = {name: report.intervals() for name, report in inputs.reports.items()}
    names = {name for figures in flat.values() for name in figures} - SAME.keys()
    groups: dict[str, list[Row]] = {criterion: [] for criterion in CRITERIA}
    for name in sorted(names, key=page_order):
        if not (LATENCY.fullmatch(name) and "_ms_" in name):
            values = {subject: figures.get(name) for subject, figures in flat.items()}
            intervals = {subject: found.get(name) for subject, found in between.items()}
            groups[figure(name).criterion].append(_row(name, values, intervals, labels))
    return [Group(key, CRITERIA[key], rows) for key, rows in groups.items() if rows]


def _row(
    name: str,
    values: dict[str, float | None],
    intervals: dict[str, Interval | None],
    labels: list[str],
) -> Row:
    """values, intervals: of all subjects, in the order of the page; None where it has none."""
    kind = figure(name)
    known = {subject: value for subject, value in values.items() if value is not None}
    written = scale(kind, list(known.values()))
    texts = {subject: written.text(value) for subject, value in known.items()}
    marks = marked(kind, {label: known[label] for label in labels if label in known}, texts)
    cells: list[Cell | None] = []
    for subject in values:
        if subject not in known:
            cells.append(None)
            continue
        within = intervals[subject]
        interval = f"{written.text(within.low)} – {written.text(within.high)}" if within else None
        cells.append(Cell(known[subject], texts[subject], interval, marks.get(subject)))
    names = " ".join([name, *(other for other, same in SAME.items() if same == name)])
    return Row(names, kind.title, written.unit, kind.better, cells)


def marked(kind: Figure, values: dict[str, float], texts: dict[str, str]) -> dict[str, str]:
    """Subject: best or worst. What reads the same is marked the same.

    A mark that more than half of them would bear distinguishes nobody and is left out.
    """
    written = [texts[name] for name in values]
    if kind.better is None or len(set(written)) < 2:
        return {}
    low, high = (texts[end(values, key=lambda name: values[name])] for end in (min, max))
    best, worst = (high, low) if kind.better == "higher" else (low, high)
    marks = {
        text: mark
        for text, mark in ((best, "best"), (worst, "worst"))
        if 2 * written.count(text) <= len(written)
    }
    return {name: marks[texts[name]] for name in values if texts[name] in marks}


def overview(spec: PageSpec, inputs: Inputs, groups: list[Group]) -> list[Row]:
    """Of many candidates, the figures that tell them apart at a glance; of few, none."""
    if not numbers(spec):
        return []
    rows = {row.names.split()[0]: row for group in groups for row in group.rows}
    quality = quality_figure(spec, inputs)
    shown = [rows[quality]] if quality in rows else []
    shown += [bare(rows[name]) for name in AT_A_GLANCE if name in rows]
    if name := overhead_figure(inputs):
        reports = inputs.reports.items()
        values = {one: as_served(report.figures(), name, spec.merges) for one, report in reports}
        within = {one: as_served(report.intervals(), name, spec.merges) for one, report in reports}
        served = _row(name, values, within, spec.labels)
        shown.append(replace(served, title=f"{served.title}, as served"))
    return shown


def bare(row: Row) -> Row:
    """Without intervals, for which the overview has no room: the table below it has them."""
    return replace(row, cells=[cell and replace(cell, interval=None) for cell in row.cells])


def measured_how(inputs: Inputs) -> list[How]:
    """Every `how` of the reports, in the order of the table, what is said alike said once."""
    titles = CRITERIA | {"inference_overhead": CRITERIA["overhead"], "swapping": "Swapping"}
    order = list(titles)
    keys = {key for report in inputs.reports.values() for key in report.how}
    made = []
    for key in sorted(keys, key=lambda key: (order.index(key) if key in order else 99, key)):
        subjects: dict[str, list[str]] = {}
        for name, report in inputs.reports.items():
            if key in report.how:
                subjects.setdefault(report.how[key], []).append(TITLES.get(name, name))
        lines = [(", ".join(names), words) for words, names in subjects.items()]
        if len(lines) == 1:
            lines = [("", lines[0][1])]
        criterion = "overhead" if key == "inference_overhead" else key
        made.append(How(criterion, titles.get(key, key.replace("_", " ").capitalize()), lines))
    return made
