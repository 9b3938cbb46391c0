"""The stages of a task, to run by hand on a tiny base."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.report import CriteriaReport
from schemas.stages import (
    Call,
    EvaluateSpec,
    MergeSpec,
    PrepareSpec,
    RegisterSpec,
    TrainSpec,
)
from tasks.core.store import Store
from tasks.core.tokens import TokenRows
from tasks.evaluate import probes
from tasks.evaluate.stage import run as evaluate
from tasks.merge.stage import run as merge
from tasks.prepare.stage import run as prepare
from tasks.register import served_model
from tasks.register.package import Package, make_package
from tasks.train.stage import run as train


class Stages:
    """The stages of one task on one base, as the flow calls them.

    root: has `base`, and a JSONL file for each split.
    data, train, evaluate: as a recipe has them, in float32. new_tokens: of a registered answer.
    """

    def __init__(
        self,
        root: Path,
        task: str,
        data: dict[str, Any],
        train: dict[str, Any],
        evaluate: dict[str, Any],
        new_tokens: int = 1,
    ) -> None:
        self.store, self.base, self.task = Store(root / "store"), root / "base", task
        self.settings, self.measures, self.new_tokens = train, evaluate, new_tokens
        places = {path.stem: path for path in root.glob("*.jsonl")}
        sources = {name: {"path": path.name} for name, path in places.items()}
        spec = PrepareSpec.model_validate({"task": task, "data": {**sources, **data}})
        self.prepared = self.make(prepare, spec, {**places, "base": self.base})

    def make(self, run: Any, spec: Any, paths: dict[str, Path]) -> Path:
        call = Call(
            stage=spec.STAGE,
            stage_version=spec.VERSION,
            format="transformers",
            spec=spec.model_dump(mode="json"),
            paths={},
            inputs={name: path.name for name, path in paths.items() if name != "base"},
        )
        return self.store.make(call, lambda out: run(spec, paths, out)).path

    @property
    def paths(self) -> dict[str, Path]:
        return {"base": self.base, "prepared": self.prepared}

    @property
    def test_rows(self) -> TokenRows:
        return TokenRows.load(self.prepared / "tokens" / "test.safetensors")

    @property
    def test_texts(self) -> list[str]:
        lines = (self.prepared / "test_rows.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    def trained(self, candidate: dict[str, Any], rate: float, steps: int | None = None) -> Path:
        """steps: fewer than those of `train`."""
        fewer = {} if steps is None else {"max_steps": steps}
        spec = TrainSpec.model_validate(
            {
                "task": self.task,
                "candidate": candidate,
                "train": {**self.settings, **fewer, "learning_rate": rate},
                "dtype": "float32",
            }
        )
        return self.make(train, spec, self.paths)

    def merged(self, trained: Path) -> Path:
        spec = MergeSpec.model_validate({"finish": {"merge": True}})
        return self.make(merge, spec, {**self.paths, "trained": trained})

    def spec(self, subject: str) -> EvaluateSpec:
        return EvaluateSpec.model_validate(
            {
                "task": self.task,
                "subject": subject,
                "evaluate": {"repeats": 3, "bootstrap": 100, **self.measures},
                "train": {"batch_tokens": 200},
                "dtype": "float32",
            }
        )

    def evaluated(self, subject: str, entry: Path) -> Path:
        return self.make(evaluate, self.spec(subject), {**self.paths, "subject": entry})

    def packed(self, finished: Path, evaluated: Path, root: Path) -> Package:
        """The version that would be registered."""
        spec = RegisterSpec(
            task=self.task,
            name="tiny",
            recipe_name="tiny",
            base={"model": "base", "revision": None},
            max_new_tokens=self.new_tokens,
            tracking="0",
        )
        page = root / "page"
        page.mkdir()
        (page / "report.html").write_text("<html>")
        paths = {**self.paths, "finished": finished, "evaluated": evaluated, "page": page}
        return make_package(spec, paths, root / "package")

    def served(self, finished: Path, evaluated: Path, root: Path) -> served_model.ServedModel:
        """That version, loaded as MLflow loads it."""
        package = self.packed(finished, evaluated, root)
        model = served_model.ServedModel()
        model.load_context(SimpleNamespace(artifacts={"package": str(package.directory)}))
        return model

    @staticmethod
    def report_of(entry: Path) -> tuple[CriteriaReport, list[dict[str, Any]]]:
        """What an evaluation says, and its line for each test row."""
        report = CriteriaReport.model_validate_json((entry / "criteria.json").read_bytes())
        lines = (entry / "predictions.jsonl").read_text().splitlines()
        return report, [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def stages() -> type[Stages]:
    return Stages


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured by a test of its own."""
    monkeypatch.setattr(probes.Probe, "peak_mib", lambda probe: 1.0)
    monkeypatch.setattr(probes, "_spawn", lambda spec, paths: subprocess.Popen(["true"]))
