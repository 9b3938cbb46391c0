"""The tables that the command line prints."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cost import Costs, fits
from flows.criteria import criteria_table
from flows.doctor import Finding
from flows.plan import Found
from flows.records import RunRecord
from flows.screen import seconds
from schemas.cost import Cost
from schemas.report import GateVerdict
from tasks.register.registry import VersionRecord


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
    if record.against_best:
        facts.add_row("told apart", told_apart(record))
    for name, why in record.failed.items():
        facts.add_row("failed", f"{name}: {why}")
    facts.add_row("gate", "\n".join(gate_lines(gate)) or "no bounds given")
    aliases = " and ".join(record.aliases)
    facts.add_row("registered", f"{registered.name} version {registered.version}, {aliases}")
    difference = f"reloaded, its logits differ by {registered.max_logit_difference:.2g}"
    facts.add_row("loads as trained", difference)
    facts.add_row("report", record.report or "")
    return Group("", criteria_table(record), "", facts)


def told_apart(record: RunRecord) -> str:
    """Who is told apart from the best candidate, in words."""
    apart = [test.label for test in record.against_best if test.apart]
    same = [test.label for test in record.against_best if not test.apart]
    parts = [f"worse than {record.best}: {', '.join(apart)}"] if apart else []
    parts += [f"not distinguishable from {record.best}: {', '.join(same)}"] if same else []
    seeds = f" ({len(record.seeds)} seeds)" if len(record.seeds) > 1 else ""
    return "; ".join(parts) + seeds


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


def plan_table(steps: list[Found], later: dict[str, str]) -> Table:
    """What is in the store, what would be made, and what depends on what."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "took", "key"):
        table.add_column(column, justify="right" if column == "took" else "left")
    for found in steps:
        state = "[dim]cached[/]" if found.cached else "[yellow]to make[/]"
        took = "" if found.seconds is None else seconds(found.seconds)
        table.add_row(found.step.title, state, took, found.key[:12])
    for title, awaited in later.items():
        table.add_row(title, awaited, "", "")
    return table


def cost_table(costs: Costs) -> Table:
    """A row for each candidate: what it would train, hold, compute and take."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), title="Expected", title_justify="left")
    table.add_column("candidate", style="cyan", overflow="fold", min_width=12)
    for name in ("trained", "of base", "ships", "training", "serving", "FLOP/token", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits")
    for label, cost in costs.candidates.items():
        fit = fits(cost, costs.device_mib).partition(":")[0]
        table.add_row(
            label,
            *trained_cells(cost),
            size(cost.inference_mib),
            counted(cost.flops_per_token) if cost.trains else "–",
            duration(cost, costs.rate) if cost.trains else "–",
            f"[{'green' if fit == 'yes' else 'red'}]{fit}[/]",
        )
    return table


def trained_cells(cost: Cost) -> list[str]:
    """Weights, their share of the base, what ships, and the peak of training."""
    if cost.training_mib is None or cost.shipped_mib is None:
        return ["–"] * 4
    return [
        f"{cost.trainable_parameters:,}",
        f"{cost.trainable_share:.3%}",
        size(cost.shipped_mib),
        size(cost.training_mib["total"]),
    ]


def cost_lines(costs: Costs) -> str:
    """What all trainings take, what training memory is made of, and what the figures rest on."""
    lines = [in_all_line(costs)] if costs.trainings else []
    for label, cost in costs.candidates.items():
        parts = {name: mib for name, mib in (cost.training_mib or {}).items() if mib}
        named = ", ".join(f"{name} {size(parts[name])}" for name in parts if name != "total")
        lines.append(f"[dim]{label}: {named or 'trains nothing'}[/]")
        fit, _, cure = fits(cost, costs.device_mib).partition(": ")
        if fit == "no":
            lines.append(f"[red]{label} does not fit[/], try: {cure}")
    rows = "" if costs.prepared else "; rows are not prepared yet: full ones are taken"
    lines.append(f"[dim]device: {costs.device}, {size(costs.device_mib)}{rows}[/]\n")
    return "\n".join(lines)


def in_all_line(costs: Costs) -> str:
    """All seeds and the trials of a search."""
    words = f"in all: {costs.trainings} training{'s' if costs.trainings > 1 else ''}"
    if costs.flops is not None and costs.rate is not None:
        words += f", about {seconds(costs.flops / costs.rate)}"
    return words


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


def duration(cost: Cost, rate: float | None) -> str:
    """One training's time; without rows its speed."""
    if rate is None:
        return "–"
    if cost.flops is None:
        speed = rate / cost.flops_per_token
        return f"{speed:,.2g} tok/s" if speed < 1 else f"{speed:,.0f} tok/s"
    return f"about {seconds(cost.flops / rate)}"


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
