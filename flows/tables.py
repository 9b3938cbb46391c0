"""The tables that the command line prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cost import Costs, fits
from flows.doctor import Finding
from flows.plan import Found
from flows.records import RunRecord, Subject
from flows.screen import seconds
from schemas.report import TASK_METRICS, GateVerdict
from tasks.register.registry import VersionRecord

Get = Callable[[Subject], float | None]

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
        Line("", "trained parameters", reader("trainable_parameters"), ",.0f", True),
        Line("", "% of the base", reader("trainable_share", 100), ".2f", True),
        Line("memory", "training peak MiB", reader("train_peak_mib"), ",.0f", True),
        Line("", "generating peak MiB", reader("generate_peak_mib"), ",.0f", True),
        Line(
            "computation",
            "forward MFLOP/token",
            reader("forward_flops_per_token", 1e-6),
            ",.2f",
            True,
        ),
        Line("", "backward MFLOP/token", reader("backward_flops_per_token", 1e-6), ",.2f", True),
        Line("", "FLOPs, full tuning = 1", reader("flops_ratio_to_full"), ".2f", True),
        Line("", "step time, s", reader("step_time_s"), ".3f", True),
        Line("", "training tokens/s", reader("train_tokens_per_s"), ",.0f", False),
    ]
    metrics = list(dict.fromkeys(name for s in subjects for name in s.accuracy["metrics"]))
    accuracy = [
        Line("", name, reader(name), ".4f" if name != "perplexity" else ".3f", name in LESS)
        for name in metrics
    ]
    accuracy.append(Line("", "retention, Δ loss", reader("retention_change"), "+.3f", True))
    ratios = [
        Line("", words(name), reader(name), ".2f", True)
        for name in dict.fromkeys(name for s in subjects for name in s.figures)
        if name.startswith(("prefill_ratio", "token_ratio"))
    ]
    for first, criterion in ((accuracy, "accuracy"), (ratios, "time × base")):
        if first:
            first[0] = Line(criterion, *list(vars(first[0]).values())[1:])
    shown = [*fixed, *accuracy, *ratios]
    return [line for line in shown if any(line.get(s) is not None for s in subjects)]


def words(name: str) -> str:
    """`token_ratio_b8_merged` as `token, batch 8, merged`."""
    what, _, rest = name.partition("_ratio_b")
    size, _, merged = rest.partition("_")
    return f"{what}, batch {size}" + (", merged" if merged else "")


def criteria_table(record: RunRecord) -> Table:
    """The five criteria: the base, each candidate (the best starred) and the finished model."""
    subjects = [s for s in (record.base, *record.candidates, record.finished) if s is not None]
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
            shown = "–" if value is None else format(value, line.form) + interval(subject, line)
            cells.append(f"{shown} [green]★[/]" if subject.label in best else f"{shown}  ")
        table.add_row(line.criterion, line.name, *cells)
    return table


def interval(subject: Subject, line: Line) -> str:
    """The 95 % interval of a metric, half its width."""
    metric = subject.accuracy["metrics"].get(line.name)
    return f" ±{(metric['high'] - metric['low']) / 2:.3f}" if metric else ""


def best_of(values: dict[str, float | None], less: bool | None) -> set[str]:
    """Who has the best value, where it is told apart from the others."""
    known = {label: value for label, value in values.items() if value is not None}
    if less is None or len(set(known.values())) < 2:
        return set()
    best = (min if less else max)(known.values())
    return {label for label, value in known.items() if value == best}


def gate_lines(verdict: GateVerdict) -> list[str]:
    """Each bound of the gate with the figure it met."""
    return [
        f"[{'green' if check.passed else 'red'}]{'✓' if check.passed else '✗'}[/] "
        f"{check.figure} {check.bound}: "
        + ("missing" if check.value is None else f"{check.value:.4g}")
        for check in verdict.checks
    ]


def outcome(record: RunRecord) -> RenderableType:
    """The end of a run: table, selection, gate, version, report; or what kept it from one."""
    if record.report is None:
        return unfinished(record)
    registered, gate = record.registered, record.gate
    assert registered is not None
    assert gate is not None
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan")
    facts.add_column(overflow="fold")
    facts.add_row("selected", record.why or "")
    facts.add_row("gate", "\n".join(gate_lines(gate)) or "no bounds given")
    aliases = " and ".join(record.aliases)
    facts.add_row("registered", f"{registered.name} version {registered.version}, {aliases}")
    difference = f"reloaded, its logits differ by {registered.max_logit_difference:.2g}"
    facts.add_row("loads as trained", difference)
    facts.add_row("report", record.report or "")
    return Group("", criteria_table(record), "", facts)


def unfinished(record: RunRecord) -> RenderableType:
    """A run without a report: its state, the stages that it came through, its errors."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan")
    facts.add_column(overflow="fold")
    facts.add_row("run", record.run_id)
    facts.add_row("state", f"{'crashed' if record.is_dead else record.state}, without a report")
    stages = (f"{line.stage} {line.label}".strip() for line in record.stages)
    facts.add_row("stages", ", ".join(stages) or "none ended")
    for error in record.errors:
        fix = f"fix: {error['fix']}" if error["fix"] else ""
        words = "\n".join(filter(None, (error["place"], error["found"], fix)))
        facts.add_row("error", Text(words))
    return facts


def last_line(record: RunRecord) -> str:
    """The last words of a run."""
    if record.all_cached:
        return f"\nEverything is already done: {len(record.stages)} stages found, nothing to make."
    made = sum(not line.cached for line in record.stages)
    word = "[yellow]Refused by the gate[/]" if record.state == "refused" else "[green]Done[/]"
    return f"\n{word}: run {record.run_id}, {made} of {len(record.stages)} stages made."


def plan_table(steps: list[Found], later: list[str]) -> Table:
    """What is in the store, what would be made, and what depends on the selection."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "took", "key"):
        table.add_column(column, justify="right" if column == "took" else "left")
    for found in steps:
        state = "[dim]cached[/]" if found.cached else "[yellow]to make[/]"
        took = "" if found.seconds is None else seconds(found.seconds)
        table.add_row(found.step.title, state, took, found.key[:12])
    for title in later:
        table.add_row(title, "after the selection", "", "")
    return table


def cost_table(costs: Costs) -> Table:
    """A row for each candidate: what it would train, hold, compute and take."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), title="Expected", title_justify="left")
    table.add_column("candidate", style="cyan", overflow="fold", min_width=12)
    for name in ("trained", "of base", "ships", "training", "serving", "FLOP/token", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for label, cost in costs.candidates.items():
        flops = cost["forward_flops_per_token"] + cost["backward_flops_per_token"]
        fit = fits(cost, costs.device_mib).partition(":")[0]
        table.add_row(
            label,
            f"{cost['trainable_parameters']:,}",
            f"{cost['trainable_share']:.3%}",
            size(cost["shipped_mib"]),
            size(cost["training_mib"]["total"]),
            size(cost["inference_mib"]),
            counted(flops),
            duration(flops, cost["tokens"], costs.rate),
            f"[{'green' if fit == 'yes' else 'red'}]{fit}[/]",
        )
    return table


def cost_lines(costs: Costs) -> str:
    """What training memory is made of, and what the figures rest on."""
    lines = []
    for label, cost in costs.candidates.items():
        parts = cost["training_mib"]
        named = ", ".join(f"{name} {size(parts[name])}" for name in parts if name != "total")
        lines.append(f"[dim]{label}: {named}[/]")
        fit, _, cure = fits(cost, costs.device_mib).partition(": ")
        if fit == "no":
            lines.append(f"[red]{label} does not fit[/], try: {cure}")
    rows = "" if costs.prepared else "; rows are not prepared yet: full ones are taken"
    lines.append(f"[dim]device: {costs.device}, {size(costs.device_mib)}{rows}[/]\n")
    return "\n".join(lines)


def size(mib: float) -> str:
    """A size with three digits or so: 0.31 MiB, 439 MiB, 2.6 TiB."""
    unit = "MiB"
    for larger in ("GiB", "TiB"):
        if mib < 1024:
            break
        mib, unit = mib / 1024, larger
    return f"{mib:.2f} {unit}" if mib < 1 else f"{mib:,.3g} {unit}"


def counted(flops: float) -> str:
    """FLOPs with their unit."""
    unit = "M"
    flops /= 1e6
    for larger in ("G", "T"):
        if flops < 1000:
            break
        flops, unit = flops / 1000, larger
    return f"{flops:.3g} {unit}"


def duration(flops: float, tokens: int | None, rate: float | None) -> str:
    """The run's time; without rows its speed."""
    if rate is None:
        return "–"
    if tokens is None:
        return f"{rate / flops:,.2g} tok/s" if rate < flops else f"{rate / flops:,.0f} tok/s"
    return f"about {seconds(flops * tokens / rate)}"


def versions_table(name: str, versions: list[VersionRecord]) -> Table:
    """The versions of a registered model side by side, newest first."""
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    table.add_column("", style="cyan")
    for version in versions:
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        table.add_column(f"{version.version}{aliases}", justify="right")
    table.add_row("made", *(version.created[:16] for version in versions))
    table.add_row("method", *(version.tags.get("peftflow.method", "") for version in versions))
    proofs = ("yes" if version.verified else "[red]no[/]" for version in versions)
    table.add_row("loads as trained", *proofs)
    for name in dict.fromkeys(name for version in versions for name in version.figures):
        values = (version.figures.get(name) for version in versions)
        table.add_row(name, *("–" if value is None else f"{value:,.4g}" for value in values))
    return table


def findings_table(findings: list[Finding]) -> Table:
    """What `doctor` found."""
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "fix"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(marks[finding.verdict], finding.what, finding.found, finding.fix)
    return table
