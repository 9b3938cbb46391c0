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

from flows.calls import Step
from flows.home import Home
from flows.records import RunRecord
from schemas.recipe import Recipe
from schemas.report import RETENTION, CurvePoint
from tasks.core.store import Entry

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CURVE = TypeAdapter(list[CurvePoint])

#: MLflow's own limit on the metrics of one batch.
BATCH = 1000
#: And on the length of a tag.
TAG_LIMIT = 5000


class Tracker:
    """Logs one pipeline run. Methods return at once; `close` waits and gives what went wrong."""

    def __init__(self, home: Home, recipe: Recipe, record: RunRecord, dead: list[str]) -> None:
        """dead: MLflow runs of processes that were killed; they are ended here."""
        self._home, self._recipe, self._record = home, recipe, record
        self._client: MlflowClient
        self._experiment = ""
        self._children: dict[str, str] = {}
        self._broken: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._logged: list[Future[None]] = []
        self._later(lambda: self._open(dead))

    def trained(self, step: Step, entry: Entry) -> None:
        """A candidate's settings as parameters and its loss curve as step metrics."""
        self._later(lambda: self._trained(step, entry))

    def evaluated(self, step: Step, entry: Entry) -> None:
        """The figures of a model as metrics."""
        self._later(lambda: self._evaluated(step, entry))

    def failed(self, name: str, why: str) -> None:
        """A candidate that came to nothing, and why."""
        self._later(lambda: self._failed(name, why))

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

    def _name(self, step: Step) -> str:
        """A run for each candidate, and where there are several seeds for each of them."""
        if step.label in ("base", "finished") or len(self._recipe.all_seeds) == 1:
            return step.label
        return self._of_seed(step.label, step.seed)

    def _of_seed(self, label: str, seed: int | None) -> str:
        """seed: None for the first, with which a candidate is measured."""
        return f"{label} seed {self._recipe.all_seeds[0] if seed is None else seed}"

    def _trained(self, step: Step, entry: Entry) -> None:
        run_id = self._child(self._name(step))
        spec = step.call.spec
        settings = {name: value for name, value in spec["candidate"].items() if name != "train"}
        if step.call.format != "prompt":  # which no schedule was followed for
            settings["train"] = spec["train"]
        self._params(run_id, settings)
        curve = CURVE.validate_json((entry.path / "curve.json").read_bytes())
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

    def _evaluated(self, step: Step, entry: Entry) -> None:
        run_id, facts = self._child(self._name(step)), entry.facts
        rows = [(name, float(value), 0) for name, value in facts["figures"].items()]
        for name, (low, high) in facts["intervals"].items():
            rows += [(f"{name}_low", low, 0), (f"{name}_high", high, 0)]
        self._metrics(run_id, rows)
        self._client.set_tag(run_id, "peftflow.evaluated", entry.key)
        self._client.set_tag(run_id, "peftflow.method", facts["method"])
        if step.label == "finished":
            self._metrics(self._parent, rows)

    def _failed(self, name: str, why: str) -> None:
        # A candidate's search and measuring, which bear its name alone, are of its first seed.
        labels = {candidate.label for candidate in self._recipe.candidates}
        if name in labels and len(self._recipe.all_seeds) > 1:
            name = self._of_seed(name, None)
        run_id = self._child(name)
        self._client.set_tag(run_id, "peftflow.failed", why[:TAG_LIMIT])
        self._broken.add(run_id)

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
        self._compared()
        for run_id in [*self._children.values(), self._parent]:
            self._client.set_terminated(run_id, "FAILED" if run_id in self._broken else status)

    def _compared(self) -> None:
        """Of several seeds the means, on the parent run: `lora-r16/accuracy`."""
        rows = []
        for subject in self._record.candidates if len(self._record.seeds) > 1 else []:
            change = subject.accuracy[RETENTION]
            known = {} if change is None else {RETENTION: change}
            for name, interval in (subject.accuracy["metrics"] | known).items():
                ends = (("", "value"), ("_low", "low"), ("_high", "high"))
                rows += [(f"{subject.label}/{name}{end}", interval[key], 0) for end, key in ends]
        self._metrics(self._parent, rows)
        for label, trials in self._record.searched.items():
            text = json.dumps([trial.model_dump() for trial in trials])
            self._client.set_tag(self._parent, f"peftflow.search.{label}", text[:TAG_LIMIT])

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
