"""Run records: what `--json` prints, what `status` and `report` read; one JSON file a run."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.home import Home
from flows.processes import Process
from schemas.report import CriteriaReport, GateVerdict, Registration, Trial
from tasks.core.files import write_atomic

State = Literal["running", "done", "failed", "wrong-input", "refused", "crashed"]

#: What the command line exits with.
EXIT_CODES: dict[State, int] = {"done": 0, "failed": 1, "wrong-input": 2, "refused": 3}


class StageLine(BaseModel):
    """One stage of a run. seconds: what making the entry took, when it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    label: str
    key: str
    cached: bool
    seconds: float | None


class Subject(BaseModel):
    """The base, a candidate or the finished model, with its five criteria and flat figures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    method: str
    storage: dict[str, Any]
    memory: dict[str, Any]
    computation: dict[str, Any]
    accuracy: dict[str, Any]
    inference_overhead: list[dict[str, Any]]
    swapping: dict[str, Any] | None = None
    figures: dict[str, float]

    @classmethod
    def of(cls, label: str, report: CriteriaReport) -> Subject:
        tree = report.model_dump(mode="json")
        criteria = {name: tree[name] for name in cls.model_fields if name in tree}
        return cls(label=label, figures=report.figures(), **criteria)


class Told(BaseModel):
    """A candidate beside the best one. p: corrected for the number of candidates."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    difference: float
    low: float
    high: float
    p: float
    apart: bool


class RunRecord(BaseModel):
    """A pipeline run from its start on; what is not known yet is null."""

    model_config = ConfigDict(extra="forbid")

    run_id: str
    recipe: str
    name: str
    state: State = "running"
    started: str = Field(default_factory=lambda: now())
    ended: str | None = None
    process: Process = Field(default_factory=Process.this)
    all_cached: bool = False
    stages: list[StageLine] = Field(default_factory=list)
    report: str | None = None
    base: Subject | None = None
    candidates: list[Subject] = Field(default_factory=list)
    finished: Subject | None = None
    seeds: list[int] = Field(default_factory=list)
    best: str | None = None
    against_best: list[Told] = Field(default_factory=list)
    searched: dict[str, list[Trial]] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)
    selected: str | None = None
    why: str | None = None
    goal: str | None = None
    registered: Registration | None = None
    aliases: list[str] = Field(default_factory=list)
    gate: GateVerdict | None = None
    promoted: bool | None = None
    prefect_flow_run: str | None = None
    mlflow_run: str | None = None
    errors: list[dict[str, str]] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    @property
    def is_dead(self) -> bool:
        """Whether it says that it is running and its process is gone."""
        return self.state == "running" and not self.process.alive

    def save(self, home: Home) -> None:
        write_atomic(home.runs / f"{self.run_id}.json", self.model_dump_json(indent=1))


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_run_id(name: str) -> str:
    """Sorts by time, names the recipe, and does not meet another's: `20260131-120000-name-1f0c`."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"


def records(home: Home) -> Iterator[RunRecord]:
    """Every readable record, newest first."""
    for path in sorted(home.runs.glob("*.json"), reverse=True):
        try:
            yield RunRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue


def dead_runs(home: Home) -> list[RunRecord]:
    return [run for run in records(home) if run.is_dead]


def begun_here(home: Home) -> RunRecord | None:
    """The record of the run that this process began, if it came that far."""
    here = Process.this()
    return next((run for run in records(home) if run.process == here), None)


def reports_path(home: Home, run_id: str) -> Path:
    return home.reports / f"{run_id}.html"
