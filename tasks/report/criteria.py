"""The table of the five criteria: a row for each figure, a column for each subject."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.report import CriteriaReport
from schemas.stages import PageSpec
from tasks.report.figures import CRITERIA, LATENCY, Figure, figure, page_order, scale
from tasks.report.inputs import TITLES, Inputs
from tasks.report.overhead import overhead_figure
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
    names = {name for figures in flat.values() for name in figures} - SAME.keys()
    groups: dict[str, list[Row]] = {criterion: [] for criterion in CRITERIA}
    for name in sorted(names, key=page_order):
        if not (LATENCY.fullmatch(name) and "_ms_" in name):
            groups[figure(name).criterion].append(_row(name, flat, inputs.reports, labels))
    return [Group(key, CRITERIA[key], rows) for key, rows in groups.items() if rows]


def _row(
    name: str,
    flat: dict[str, dict[str, float]],
    reports: dict[str, CriteriaReport],
    labels: list[str],
) -> Row:
    kind = figure(name)
    values = {subject: figures[name] for subject, figures in flat.items() if name in figures}
    written = scale(kind, list(values.values()))
    texts = {subject: written.text(value) for subject, value in values.items()}
    marks = marked(kind, {label: values[label] for label in labels if label in values}, texts)
    cells: list[Cell | None] = []
    for subject, report in reports.items():
        if subject not in values:
            cells.append(None)
            continue
        within = report.intervals().get(name)
        interval = f"{written.text(within.low)} – {written.text(within.high)}" if within else None
        cells.append(Cell(values[subject], texts[subject], interval, marks.get(subject)))
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
    overhead = overhead_figure(inputs)
    forms = [overhead, f"{overhead}_merged"] if spec.merges else [overhead]
    wanted = (quality_figure(spec, inputs), *AT_A_GLANCE, *forms)
    return [rows[name] for name in wanted if name in rows]


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
