"""What happened in a home: `status` and `report`."""

from __future__ import annotations

import difflib
from itertools import islice

from rich.console import Group, RenderableType
from rich.table import Table

from flows.home import Home
from flows.records import RunRecord, records
from flows.servers import running
from schemas.errors import UserError

#: Runs that `status` lists.
LAST = 10

COLOURS = {"done": "green", "running": "blue", "refused": "yellow"}


def find_run(home: Home, run_id: str | None) -> RunRecord:
    """The run of this id, or the last one that came to a report.

    Raises:
        UserError: there is none.
    """
    known = list(records(home))
    for record in known:
        if record.run_id == run_id or (run_id is None and record.report is not None):
            return record
    if run_id is None:
        raise UserError.at(home.root, "no run has ended with a report", "peftflow run RECIPE")
    near = difflib.get_close_matches(run_id, [record.run_id for record in known], n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}?" if near else "`peftflow status` lists the runs"
    raise UserError.at(f"run {run_id}", f"is not among the runs in {home.runs}", hint)


def status(home: Home) -> RenderableType:
    """Servers, the last runs, and what each registered model has as champion."""
    parts: list[RenderableType] = [f"home     {home.root}"]
    for name, given in (("prefect", None), ("mlflow", home.mlflow_server)):
        server = running(home, name)
        url = given or (server and server.url)
        parts.append(f"{name:<8} {url or 'down (`peftflow up` starts it)'}")
    table = Table(box=None, pad_edge=False)
    for column in ("run", "recipe", "state", "selected", "version"):
        table.add_column(column)
    for record in islice(records(home), LAST):
        state = "crashed" if record.is_dead else record.state
        version = (
            f"{record.registered.name} {record.registered.version}" if record.registered else ""
        )
        note = ", nothing to make" if record.all_cached else ""
        colour = COLOURS.get(state, "red")
        table.add_row(
            record.run_id,
            record.name,
            f"[{colour}]{state}[/]{note}",
            record.selected or "",
            version,
        )
    if table.row_count:
        parts += ["", table]
    champions = _champions(home)
    if champions:
        parts += ["", *champions]
    return Group(*parts)


def _champions(home: Home) -> list[str]:
    """Each model's champion by the ledger, which needs no MLflow."""
    from tasks.register.promote import ledger

    found = []
    for name in sorted({run.registered.name for run in records(home) if run.registered}):
        entries = [entry for entry in ledger(home.root, name) if entry.alias == "champion"]
        if entries:
            last = entries[-1]
            found.append(f"champion of {name}: version {last.to_version}, {last.when} ({last.why})")
    return found
