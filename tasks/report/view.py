"""The page's words and tables, computed here so that the template only lays them out."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.report import CriteriaReport, Interval, Latency
from schemas.stages import PageSpec
from tasks.report.figures import CRITERIA, MS, RATIO, Figure, Scale, figure, page_order, scale
from tasks.report.inputs import BASE, FINISHED, Inputs

#: The same figure in another unit: shown once, in the row of the other.
SAME = {"adapter_mib": "shipped_bytes"}

#: Which of the metrics stands for accuracy when the goal is none of them.
PRIMARY = ("accuracy", "exact_match", "field_f1", "macro_f1", "perplexity", "loss")


@dataclass(frozen=True)
class Cell:
    """value: unrounded, for machines. mark: best or worst of the candidates."""

    value: float
    text: str
    interval: str | None = None
    mark: str | None = None


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
class Tile:
    """One criterion of the selected candidate, at a glance."""

    title: str
    value: str
    unit: str
    note: str


def subject_title(name: str) -> str:
    """A subject as the page names it."""
    return {BASE: "base, untouched", FINISHED: "finished"}.get(name, name)


def quality_figure(spec: PageSpec, inputs: Inputs) -> str:
    """The metric that stands for accuracy: the goal where it is a metric, else the task's own."""
    metrics = inputs.reports[spec.selected].accuracy.metrics
    if spec.goal in metrics:
        return spec.goal
    return next((name for name in PRIMARY if name in metrics), next(iter(metrics)))


def in_words(name: str, value: float, interval: Interval | None = None) -> str:
    """A figure with its unit, e.g. `92.6 % (95 % interval 91.6 to 93.5)`."""
    written = scale(figure(name), [value])
    words = _with_unit(written.text(value), written.unit)
    if interval is None:
        return words
    return f"{words} (95 % interval {written.text(interval.low)} to {written.text(interval.high)})"


def _with_unit(text: str, unit: str) -> str:
    return f"{text}\u00a0{unit}" if unit else text


def verdict(spec: PageSpec, inputs: Inputs) -> str:
    """What was selected and how good it is, in one sentence that follows the candidate's name."""
    chosen = inputs.reports[spec.selected]
    name = quality_figure(spec, inputs)
    measured = chosen.accuracy.metrics[name]
    base = inputs.reports[BASE].accuracy.metrics.get(name)
    against = f", against {in_words(name, base.value)} for the untouched base" if base else ""
    goal = ""
    if spec.goal != name and spec.goal in chosen.figures():
        title = figure(spec.goal).title.lower()
        goal = f"{title} {in_words(spec.goal, chosen.figures()[spec.goal])}, and "
    return (
        f"is selected: {goal}{figure(name).title.lower()} "
        f"{in_words(name, measured.value, measured)} "
        f"on {chosen.accuracy.rows:,} held-out rows{against}."
    )


def criteria_table(inputs: Inputs, labels: list[str]) -> list[Group]:
    """Every figure of every subject, grouped by criterion; a column for each of the reports."""
    reports = inputs.reports
    flat = {name: report.figures() for name, report in reports.items()}
    names = {name for figures in flat.values() for name in figures} - SAME.keys()
    groups: dict[str, list[Row]] = {criterion: [] for criterion in CRITERIA}
    for name in sorted(names, key=page_order):
        row = _row(name, flat, reports, labels)
        groups[figure(name).criterion].append(row)
    return [Group(key, CRITERIA[key], rows) for key, rows in groups.items() if rows]


def _row(
    name: str,
    flat: dict[str, dict[str, float]],
    reports: dict[str, CriteriaReport],
    labels: list[str],
) -> Row:
    kind = figure(name)
    written = scale(kind, [figures[name] for figures in flat.values() if name in figures])
    shown = {subject: written.text(values[name]) for subject, values in flat.items() if name in values}
    marks = _marks(kind, {label: flat[label][name] for label in labels if label in shown}, shown)
    cells: list[Cell | None] = []
    for subject, report in reports.items():
        if subject not in shown:
            cells.append(None)
            continue
        metric = report.accuracy.metrics.get(name)
        interval = f"{written.text(metric.low)} – {written.text(metric.high)}" if metric else None
        cells.append(Cell(flat[subject][name], shown[subject], interval, marks.get(subject)))
    names = " ".join([name, *(other for other, same in SAME.items() if same == name)])
    return Row(names, kind.title, written.unit, kind.better, cells)


def _marks(kind: Figure, values: dict[str, float], shown: dict[str, str]) -> dict[str, str]:
    """Label: best or worst, among candidates whose values differ as written."""
    if kind.better is None or len({shown[label] for label in values}) < 2:
        return {}
    low, high = min(values.values()), max(values.values())
    best, worst = (high, low) if kind.better == "higher" else (low, high)
    texts = {shown[label]: "best" for label, value in values.items() if value == best}
    texts |= {shown[label]: "worst" for label, value in values.items() if value == worst}
    return {label: texts[shown[label]] for label in values if shown[label] in texts}


def measured_how(inputs: Inputs) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(criterion, its title, [(subjects, in words)]): one line where all were measured alike."""
    keys = {key for report in inputs.reports.values() for key in report.how}
    titles = CRITERIA | {"inference_overhead": CRITERIA["overhead"]}
    ordered = sorted(keys, key=lambda key: (_place(key, titles), key))
    found = []
    for key in ordered:
        subjects: dict[str, list[str]] = {}
        for name, report in inputs.reports.items():
            if key in report.how:
                subjects.setdefault(report.how[key], []).append(subject_title(name))
        if len(subjects) == 1:
            lines = [("", next(iter(subjects)))]
        else:
            lines = [(", ".join(names), words) for words, names in subjects.items()]
        criterion = "overhead" if key == "inference_overhead" else key
        found.append((criterion, titles.get(key, key.replace("_", " ").capitalize()), lines))
    return found


def _place(key: str, titles: dict[str, str]) -> int:
    return list(titles).index(key) if key in titles else len(titles)


@dataclass(frozen=True)
class LatencyRow:
    batch_size: int
    merged: str
    prefill: tuple[str, str, str]
    token: tuple[str, str, str] | None


@dataclass(frozen=True)
class LatencyGroup:
    subject: str
    rows: list[LatencyRow]


def latency_table(inputs: Inputs) -> list[LatencyGroup]:
    """(p50, p95, ratio to the base) of each subject, batch size and form."""
    every = [row for report in inputs.reports.values() for row in report.inference_overhead]
    times = [row.prefill_p50_ms for row in every]
    times += [row.token_p50_ms for row in every if row.token_p50_ms is not None]
    ms = scale(Figure("", "overhead", "", MS, None), times)
    ratio = Scale(1, RATIO[0][1], 2)
    groups = []
    for name, report in inputs.reports.items():
        rows = [
            _latency_row(row, ms, ratio)
            for row in sorted(report.inference_overhead, key=lambda row: (row.batch_size, row.merged))
        ]
        groups.append(LatencyGroup(subject_title(name), rows))
    return [group for group in groups if group.rows]


def _latency_row(row: Latency, ms: Scale, ratio: Scale) -> LatencyRow:
    prefill = (
        ms.text(row.prefill_p50_ms),
        ms.text(row.prefill_p95_ms),
        ratio.text(row.prefill_ratio),
    )
    token = None
    if row.token_p50_ms is not None and row.token_p95_ms is not None:
        share = "–" if row.token_ratio is None else ratio.text(row.token_ratio)
        token = (ms.text(row.token_p50_ms), ms.text(row.token_p95_ms), share)
    return LatencyRow(row.batch_size, "yes" if row.merged else "no", prefill, token)


def overhead_figure(inputs: Inputs) -> str | None:
    """The ratio that stands for inference overhead: smallest batch, decoding where there is any."""
    names = [name for report in inputs.reports.values() for name in report.figures()]
    ratios = [name for name in names if name.startswith(("token_ratio_b", "prefill_ratio_b"))]
    plain = [name for name in ratios if not name.endswith("_merged")]
    ordered = sorted(plain or ratios, key=lambda name: (not name.startswith("token"), page_order(name)))
    return ordered[0] if ordered else None


def tiles(spec: PageSpec, inputs: Inputs) -> list[Tile]:
    """The five criteria of the selected candidate, each beside what to compare it with."""
    chosen, base = inputs.reports[spec.selected], inputs.reports[BASE]
    figures, base_figures = chosen.figures(), base.figures()
    quality = quality_figure(spec, inputs)
    share = in_words("trainable_share", figures["trainable_share"])
    overhead = overhead_figure(inputs)
    wanted = [
        (quality, _than(base_figures.get(quality), quality, "base")),
        ("shipped_bytes", f"{share} of the base trained"),
        ("train_peak_mib", f"answering: {in_words('generate_peak_mib', figures['generate_peak_mib'])}"),
        ("step_time_s", _of_full(figures.get("step_time_ratio_to_full"))),
        ("retention_change", "nats a token, on general text" if chosen.accuracy.rows else ""),
    ]
    if overhead:
        wanted.append((overhead, "of the base’s latency"))
    made = []
    for name, note in wanted:
        if name in figures:
            written = scale(figure(name), [figures[name]])
            value = written.text(figures[name])
            if name == "retention_change" and figures[name] > 0:
                value = f"+{value}"
            title = TILE_TITLES.get(name, figure(name).title)
            made.append(Tile(title, value, "" if name == "retention_change" else written.unit, note))
    return made


TILE_TITLES = {
    "shipped_bytes": "Shipped",
    "train_peak_mib": "Training memory",
    "step_time_s": "Optimiser step",
    "retention_change": "Forgetting",
}


def _than(value: float | None, name: str, whose: str) -> str:
    return f"{whose}: {in_words(name, value)}" if value is not None else ""


def _of_full(ratio: float | None) -> str:
    return f"{ratio:.2f} × full fine-tuning’s" if ratio is not None else ""
