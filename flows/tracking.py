"""A pipeline run in MLflow: a parent run, and a child run for each model that was measured.

Written by one thread of its own, so that MLflow's start-up and SQLite hide behind the stages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from flows.home import Home
from flows.records import RunRecord
from schemas.candidates import Candidate
from schemas.recipe import Recipe
from schemas.report import CriteriaReport, CurvePoint

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CURVE = TypeAdapter(list[CurvePoint])

#: MLflow's own limit on the metrics of one batch.
BATCH = 1000


class Tracker:
    """Logs one pipeline run. Methods return at once; `close` waits and gives what went wrong."""

    def __init__(self, home: Home, recipe: Recipe, record: RunRecord, dead: list[str]) -> None:
        """dead: MLflow runs of processes that were killed; they are ended here."""
        self._home, self._recipe, self._record = home, recipe, record
        self._client: MlflowClient
        self._experiment = ""
        self._children: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._logged: list[Future[None]] = []
        self._later(lambda: self._open(dead))

    def trained(self, candidate: Candidate, path: Path) -> None:
        """A candidate's settings as parameters and its loss curve as step metrics."""
        self._later(lambda: self._trained(candidate, path))

    def evaluated(self, label: str, key: str, path: Path) -> None:
        """The five criteria of a model as metrics."""
        self._later(lambda: self._evaluated(label, key, path))

    def reported(self, page: Path) -> None:
        """The HTML report as an artifact of the parent run."""
        self._later(lambda: self._client.log_artifact(self._parent, str(page)))

    def close(self) -> list[str]:
        """End every run with the record's state; each thing that could not be logged, in words."""
        self._later(self._end)
        self._thread.shutdown(wait=True)
        return [str(error) for log in self._logged if (error := log.exception()) is not None]

    def _later(self, work: Callable[[], Any]) -> None:
        self._logged.append(self._thread.submit(work))

    @property
    def _parent(self) -> str:
        assert self._record.mlflow_run is not None, "MLflow could not be opened"
        return self._record.mlflow_run

    def _open(self, dead: list[str]) -> None:
        from tasks.register.registry import connect, experiment

        self._client = connect(self._home.tracking_uri)
        for run_id in dead:
            self._client.set_terminated(run_id, "KILLED")
        self._experiment = experiment(self._client, self._recipe.name)
        record = self._record
        tags = {"peftflow.run_id": record.run_id, "peftflow.recipe": record.recipe}
        if record.prefect_flow_run:
            tags["prefect.flow_run_id"] = record.prefect_flow_run
        run = self._client.create_run(self._experiment, run_name=record.run_id, tags=tags)
        record.mlflow_run = run.info.run_id
        tree = self._recipe.model_dump(mode="json", by_alias=True, exclude={"candidates"})
        self._params(run.info.run_id, tree)

    def _child(self, label: str) -> str:
        if label not in self._children:
            tags = {
                "mlflow.parentRunId": self._parent,
                "peftflow.run_id": self._record.run_id,
                "peftflow.subject": label,
            }
            run = self._client.create_run(self._experiment, run_name=label, tags=tags)
            self._children[label] = run.info.run_id
        return self._children[label]

    def _trained(self, candidate: Candidate, path: Path) -> None:
        run_id = self._child(candidate.label)
        settings = candidate.model_dump(mode="json", exclude={"name", "train"})
        if candidate.FORMAT != "prompt":
            schedule = self._recipe.train.for_candidate(candidate.train)
            settings["train"] = schedule.model_dump(mode="json")
        self._params(run_id, settings)
        curve = CURVE.validate_json((path / "curve.json").read_bytes())
        rows = [
            (name, value, point.step)
            for point in curve
            for name, value in (
                ("train_loss", point.loss),
                ("learning_rate", point.learning_rate),
                ("grad_norm", point.grad_norm),
            )
        ]
        self._metrics(run_id, rows)

    def _evaluated(self, label: str, key: str, path: Path) -> None:
        run_id = self._child(label)
        report = CriteriaReport.model_validate_json((path / "criteria.json").read_bytes())
        rows = [(name, value, 0) for name, value in report.figures().items()]
        for name, interval in report.accuracy.metrics.items():
            rows += [(f"{name}_low", interval.low, 0), (f"{name}_high", interval.high, 0)]
        self._metrics(run_id, rows)
        self._client.set_tag(run_id, "peftflow.evaluated", key)
        self._client.set_tag(run_id, "peftflow.method", report.method)
        if label == "finished":
            self._metrics(self._parent, rows)

    def _end(self) -> None:
        status = {"done": "FINISHED", "refused": "FINISHED"}.get(self._record.state, "FAILED")
        for line in self._record.stages:
            name = f"peftflow.key.{line.stage}" + (f".{line.label}" if line.label else "")
            self._client.set_tag(self._parent, name, line.key)
        if self._record.selected:
            self._client.set_tag(self._parent, "peftflow.selected", self._record.selected)
        if self._record.registered:
            version = f"{self._record.registered.name}/{self._record.registered.version}"
            self._client.set_tag(self._parent, "peftflow.version", version)
        for run_id in [*self._children.values(), self._parent]:
            self._client.set_terminated(run_id, status)

    def _params(self, run_id: str, tree: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in sorted(flat(tree).items())]
        self._client.log_batch(run_id, params=params)

    def _metrics(self, run_id: str, rows: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        stamp = int(time.time() * 1000)
        metrics = [Metric(name, value, stamp, step) for name, value, step in rows]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested section as `a.b.c: value`, values as text that MLflow can hold."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found
