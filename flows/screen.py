"""What a run looks like: lines for what happened, and on a terminal live bars for what happens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from flows.calls import Step
from flows.execute import Event
from flows.records import StageLine
from schemas.errors import UserError
from schemas.report import DataReport
from tasks.core.store import Entry

#: Where output is not a terminal: wide enough for the table of five criteria.
PLAIN_WIDTH = 120


def console(stderr: bool) -> Console:
    """People's output. Its colours and bars go when it is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH)


class Screen:
    """A listener that prints. Bars appear on a terminal only; elsewhere a line for each event.

    Several steps may be under way at once, each told by a thread of its own.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = RLock()
        self._progress: Progress | None = None
        #: Title of a step: label of a bar: the bar. "" is the step's own.
        self._bars: dict[str, dict[str, TaskID]] = {}

    def begin(self, step: Step) -> None:
        if not self.console.is_terminal:
            return
        with self._lock:
            if self._progress is None:
                self._progress = self._started()
            bar = self._progress.add_task(step.title, total=None, unit="", figures="")
            self._bars[step.title] = {"": bar}

    def _started(self) -> Progress:
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[figures]}"),
            console=self.console,
            transient=True,
        )
        progress.start()
        return progress

    def event(self, step: Step, event: Event) -> None:
        kind = event["event"]
        if kind == "progress":
            self._advance(step, event)
        elif kind == "warning":
            self.line(f"  warning, {step.title}: {event['message']}", style="yellow")
        elif step.call.stage != "prepare":  # whose report is shown, cached or not, at its end
            self.line(f"  {step.title}: {event['message']}")

    def end(self, step: Step, line: StageLine | None, entry: Entry | None) -> None:
        self._clear(step)
        if line is None or entry is None:
            self.console.print(f"[red]✗[/] {step.title:<28} failed")
            return
        took = "" if line.seconds is None else seconds(line.seconds)
        word = "[dim]cached[/]" if line.cached else "made  "
        self.console.print(
            f"[green]✓[/] {step.title:<28} {word} {took:>9}  [dim]{line.key[:12]}[/]"
        )
        if step.call.stage == "prepare":
            self.data(entry.path)

    def data(self, rows: Path) -> None:
        """Rows in, kept and refused by reason, for each split."""
        report = DataReport.model_validate_json((rows / "data_report.json").read_bytes())
        for name, split in report.splits.items():
            refused = split.rows_in - split.rows_kept
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in split.refused.items())
            text = f"    {name:<9} {split.rows_in:,} rows in = {split.rows_kept:,} kept"
            text += f" + {refused:,} refused" + (f" ({reasons})" if reasons else "")
            if split.truncated:
                text += f"; {split.truncated:,} truncated"
            if split.label_less:
                text += f"; {split.label_less:,} without a label"
            self.line(text)

    def line(self, text: str, style: str | None = None) -> None:
        """A line as it is: no markup, and no breaks but the terminal's own."""
        self.console.print(text, markup=False, highlight=False, style=style, soft_wrap=True)

    def error(self, error: Exception) -> None:
        """What went wrong; for a user's input each problem with its place and its fix."""
        if isinstance(error, UserError):
            count = len(error.problems)
            head = "one thing has" if count == 1 else f"{count} things have"
            self.console.print(f"[red]✗[/] {head} to be put right:")
            for problem in error.problems:
                self.line(f"  {problem.place}", style="bold")
                self.line(f"    {problem.found}")
                self.line(f"    fix: {problem.fix}")
        else:
            self.console.print("[red]✗[/] ", end="")
            self.line(str(error) or type(error).__name__)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner on a terminal, silence elsewhere."""
        if self.console.is_terminal:
            with self.console.status(what):
                yield
        else:
            yield

    def _clear(self, step: Step) -> None:
        """Take the step's bars away, and the last one's with all of it."""
        with self._lock:
            bars = self._bars.pop(step.title, {})
            if self._progress is None:
                return
            for bar in bars.values():
                self._progress.remove_task(bar)
            if not self._bars:
                self._progress.stop()
                self._progress = None

    def _advance(self, step: Step, event: Event) -> None:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in event["figures"].items())
        label = str(event["label"])
        with self._lock:
            bars = self._bars.get(step.title)
            if self._progress is None or bars is None:
                return
            if label not in bars:
                # With several steps under way a bar's own word does not say whose it is.
                shown = label if len(self._bars) == 1 else f"{step.title}: {label}"
                bars[label] = self._progress.add_task(
                    shown,
                    total=event["total"],
                    completed=event["done"],
                    unit=event["unit"],
                    figures="",
                )
            self._progress.update(
                bars[label],
                completed=event["done"],
                total=event["total"],
                figures=figures,
                visible=event["done"] < event["total"],
            )


class Rate(ProgressColumn):
    """Done, total, and units a second over the last half minute."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        unit = task.fields["unit"]
        rate = f", {task.speed:,.4g} {unit}/s" if task.speed else ""
        return Text(f"{task.completed:,.0f}/{task.total:,.0f} {unit}{rate}")


def seconds(value: float) -> str:
    """A duration as people read it: 0.4 s, 41 s, 3 min 05 s."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )
