"""What every benchmark shares: rows with bars, a table, and a provenance-stamped JSON file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tasks.core.provenance import git_state, libraries, machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """One measured figure. bar: what it should be, e.g. ">= 5"; met: whether it is."""

    name: str
    value: float | str
    unit: str
    bar: str | None = None
    met: bool | None = None


def at_least(name: str, value: float, unit: str, limit: float) -> Result:
    return Result(name, round(value, 4), unit, f">= {limit}", value >= limit)


def at_most(name: str, value: float, unit: str, limit: float) -> Result:
    return Result(name, round(value, 4), unit, f"<= {limit}", value <= limit)


def portable(argument: str) -> str:
    """An argument as others would write it: a place of this machine is `DIR`."""
    return "DIR" if Path(argument).is_absolute() else argument


def write(name: str, rows: list[Result], *, quick: bool, notes: str = "") -> None:
    """Print the table; write benchmarks/results/NAME.json (NAME.quick.json for a short run)."""
    table = Table(title=f"benchmarks: {name}" + (" --quick" if quick else ""))
    for column in ("what", "value", "unit", "bar", "met"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for row in rows:
        value = f"{row.value:,.4g}" if isinstance(row.value, float) else str(row.value)
        met = {None: "", True: "yes", False: "NO"}[row.met]
        table.add_row(row.name, value, row.unit, row.bar or "", met)
    Console(width=110).print(table)
    path = keep(name, rows, quick=quick, notes=notes)
    print(f"written: {path.relative_to(RESULTS.parent.parent)}")


def keep(name: str, rows: list[Result], *, quick: bool, notes: str = "") -> Path:
    """Write the file alone, and say where it is."""
    # A result that was just written does not change what the next benchmark measures.
    commit, dirty = git_state(ignore="benchmarks/results")
    record = {
        "provenance": {
            "commit": commit,
            "dirty": dirty,
            "machine": machine(),
            "libraries": libraries(),
            "python": sys.version.split()[0],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(
                ["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(portable, sys.argv[1:])]
            ),
        },
        "notes": notes,
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}.quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
