"""The five criteria as a table of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from flows.records import RunRecord, Subject
from schemas.report import RETENTION, TASK_METRICS

Get = Callable[[Subject], float | None]

#: Candidates that fit beside one another.
COLUMNS = 5
#: The second line of a heading without a unit.
NOTHING = "\n"
FIRST_RATIO = re.compile(r"prefill_ratio_b(\d+)")
#: Of Turbo heads, for each batch size: figure, words, format.
TURBO = (
    ("tokens_per_s", "tokens/s", ",.0f"),
    ("speedup", "× generate()", ".2f"),
    ("speculation", "× no drafts", ".2f"),
    ("tokens_per_pass", "tokens a pass", ".2f"),
)
#: As the table calls it.
FORGOTTEN = "retention, Δ loss"
#: Metrics of which less is better.
LESS = {name for known in TASK_METRICS.values() for name, more in known.items() if not more}


@dataclass(frozen=True)
class Line:
    """One figure of the table. less: whether a smaller value is the better one; None: neither."""

    criterion: str
    name: str
    get: Get
    form: str
    less: bool | None


def reader(name: str, scale: float = 1.0) -> Get:
    """Reads a flat figure (`CriteriaReport.figures`)."""

    def get(subject: Subject) -> float | None:
        value = subject.figures.get(name)
        return None if value is None else value * scale

    return get


def lines_of(subjects: list[Subject]) -> list[Line]:
    """The figures that at least one subject has, by criterion."""
    fixed = [
        Line("storage", "shipped MiB", reader("shipped_bytes", 2**-20), ",.2f", True),
        Line("", "ten tasks, MiB", reader("ten_tasks_bytes", 2**-20), ",.2f", True),
        Line("", "trained parameters", reader("trainable_parameters"), ",.0f", True),
        Line("", "% of the base", reader("trainable_share", 100), ".2f", True),
        Line("memory", "training peak MiB", reader("train_peak_mib"), ",.0f", True),
        *(
            Line("", f"· {part}", reader(f"train_{part}_mib"), ",.1f", None)
            for part in ("weights", "gradients", "optimiser", "activations", "rest")
        ),
        Line("", "generating peak MiB", reader("generate_peak_mib"), ",.0f", True),
        Line(
            "computation",
            "forward MFLOP/token",
            reader("forward_flops_per_token", 1e-6),
            ",.2f",
            True,
        ),
        Line("", "backward MFLOP/token", reader("backward_flops_per_token", 1e-6), ",.2f", True),
        Line("", "training MFLOP/token", reader("train_flops_per_token", 1e-6), ",.2f", True),
        Line("", "FLOPs, full tuning = 1", reader("flops_ratio_to_full"), ".2f", True),
        Line("", "step time, s", reader("step_time_s"), ".3f", True),
        Line("", "training tokens/s", reader("train_tokens_per_s"), ",.0f", False),
    ]
    metrics = list(dict.fromkeys(name for s in subjects for name in s.accuracy["metrics"]))
    accuracy = [
        Line("", name, reader(name), ".4f" if name != "perplexity" else ".3f", name in LESS)
        for name in metrics
    ]
    accuracy.append(Line("", FORGOTTEN, reader(RETENTION), "+.3f", True))
    ratios = [
        Line("", words(name), reader(name), ".2f", True)
        for name in dict.fromkeys(name for s in subjects for name in s.figures)
        if name.startswith(("prefill_ratio", "token_ratio"))
    ]
    for first, criterion in ((accuracy, "accuracy"), (ratios, "time × base")):
        if first:
            first[0] = Line(criterion, *list(vars(first[0]).values())[1:])
    swaps = [
        Line("swapping", "one adapter to another, ms", reader("swap_ms"), ".2f", True),
        Line("", "ten adapters, MiB", reader("ten_adapters_mib"), ",.2f", True),
    ]
    sizes = dict.fromkeys(
        name.removeprefix("speedup_b")
        for s in subjects
        for name in s.figures
        if name.startswith("speedup_b")
    )
    turbo = [
        Line("", f"{what}, batch {size}", reader(f"{name}_b{size}"), form, False)
        for size in sizes
        for name, what, form in TURBO
    ]
    if turbo:
        turbo[0] = Line("turbo", *list(vars(turbo[0]).values())[1:])
    shown = [*fixed, *accuracy, *ratios, *swaps, *turbo]
    return [line for line in shown if any(line.get(s) is not None for s in subjects)]


def words(name: str) -> str:
    """`token_ratio_b8_p256_merged` as `token, batch 8, 256 tokens, merged`."""
    what, _, rest = name.partition("_ratio_b")
    size, *others = rest.split("_")
    shown = [what, f"batch {size}"]
    shown += [f"{other[1:]} tokens" if other[0] == "p" else other for other in others]
    return ", ".join(shown)


def criteria_table(record: RunRecord) -> Table:
    """The five criteria: the base, each candidate (the best starred) and the finished model."""
    return turned(record) if len(record.candidates) > COLUMNS else whole(record)


def whole(record: RunRecord) -> Table:
    """Every figure a row, every subject a column."""
    subjects = subjects_of(record)
    candidates = {candidate.label for candidate in record.candidates}
    table = Table(title="Five criteria", title_justify="left", pad_edge=False, box=None)
    table.add_column("", style="cyan", no_wrap=True)
    table.add_column("", no_wrap=True)
    for subject in subjects:
        chosen = subject.label == record.selected
        # Folded: names that were cut short would look alike.
        style = "bold" if chosen else ""
        table.add_column(subject.label, justify="right", overflow="fold", style=style)
    for line in lines_of(subjects):
        values = {subject.label: line.get(subject) for subject in subjects}
        best = best_of({label: values[label] for label in candidates}, line.less)
        cells = []
        for subject in subjects:
            value = values[subject.label]
            shown = (
                "–" if value is None else format(value, line.form) + interval(subject, line.name)
            )
            cells.append(f"{shown} [green]★[/]" if subject.label in best else f"{shown}  ")
        table.add_row(line.criterion, line.name, *cells)
    return table


def turned(record: RunRecord) -> Table:
    """Every subject a row, and one or two figures of each criterion; the report has them all."""
    lines = few_lines(record)
    best = {
        line.name: best_of({s.label: line.get(s) for s in record.candidates}, line.less)
        for line in lines
    }
    table = Table(title="Five criteria", title_justify="left", box=None, padding=(0, 1, 0, 0))
    # Folded where there is no room: names that were cut short would look alike.
    table.add_column("", overflow="fold")
    for line in lines:
        table.add_column(line.name, justify="right", overflow="fold")
    for subject in subjects_of(record):
        cells = []
        for line in lines:
            value = line.get(subject)
            metric = line.name.removesuffix(NOTHING)
            shown = "–" if value is None else format(value, line.form) + interval(subject, metric)
            cells.append(shown + ("[green]★[/]" if subject.label in best[line.name] else " "))
        style = "bold" if subject.label == record.selected else ""
        table.add_row(subject.label, *cells, style=style)
    return table


def few_lines(record: RunRecord) -> list[Line]:
    """What tells candidates apart at a glance. Their names are headings of two lines."""
    subjects = subjects_of(record)
    metrics = record.candidates[0].accuracy["metrics"]
    known = (name for figures in TASK_METRICS.values() for name in figures)
    goal = next(name for name in (record.goal, *known) if name in metrics)
    assert goal is not None
    batches = [match for s in subjects for match in map(FIRST_RATIO.fullmatch, s.figures) if match]
    batch = min((int(match[1]) for match in batches), default=1)
    lines = [
        Line("", f"{goal}{NOTHING}", reader(goal), ".4f", goal in LESS),
        Line("", "shipped\nMiB", reader("shipped_bytes", 2**-20), ",.2f", True),
        Line("", "trained\n%", reader("trainable_share", 100), ".2f", True),
        Line("", "memory\nMiB", reader("train_peak_mib"), ",.0f", True),
        Line("", "FLOPs\n× full", reader("flops_ratio_to_full"), ".2f", True),
        Line("", "prefill\n× base", either(f"prefill_ratio_b{batch}"), ".2f", True),
        Line("", "token\n× base", either(f"token_ratio_b{batch}"), ".2f", True),
    ]
    return [line for line in lines if any(line.get(s) is not None for s in subjects)]


def either(name: str) -> Get:
    """A figure, or the merged one of what is merged and has no other."""
    return lambda subject: subject.figures.get(name, subject.figures.get(f"{name}_merged"))


def subjects_of(record: RunRecord) -> list[Subject]:
    return [s for s in (record.base, *record.candidates, record.finished) if s is not None]


def interval(subject: Subject, name: str) -> str:
    """The 95 % interval of a metric or of what was forgotten, half its width."""
    known = subject.accuracy["metrics"] | {FORGOTTEN: subject.accuracy.get(RETENTION)}
    metric = known.get(name)
    return f" ±{(metric['high'] - metric['low']) / 2:.3f}" if metric else ""


def best_of(values: dict[str, float | None], less: bool | None) -> set[str]:
    """Who has the best value, where it is told apart from the others."""
    known = {label: value for label, value in values.items() if value is not None}
    if less is None or len(set(known.values())) < 2:
        return set()
    best = (min if less else max)(known.values())
    return {label for label, value in known.items() if value == best}
