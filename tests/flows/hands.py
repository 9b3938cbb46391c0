"""Hands for the story that make nothing heavy: small entries, put into the store at once."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flows.calls import Calls, Made, Step
from flows.fan_out import fan_out
from flows.home import Home
from flows.story import Outcome, story
from schemas.errors import DivergedError, StageError
from schemas.load import load_recipe
from schemas.report import Comparison, CriteriaReport, GateVerdict, Registration, Seeded
from schemas.stages import CompareSpec
from tasks.core.store import Store, key_of

T = TypeVar("T")

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "task": "causal-lm",
    "base": {"model": "base", "dtype": "float32"},
    "data": {"train": {"path": "train.jsonl"}, "test": {"holdout": 0.2}},
    "candidates": [{"method": "full"}, {"method": "lora", "rank": 2}],
    "select": {"minimize": "loss", "subject_to": {"adapter_mib": "<= 1"}},
    "register": {"name": "tiny", "gate": {"loss": "<= 2"}, "promote": True},
}


def calls(place: Path, home: Home | None = None, **changes: Any) -> Calls:
    """The calls of RECIPE with whole sections replaced."""
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    home = home or Home(place / "home")
    home.open()
    return Calls(load_recipe(path), path, home)


def report(loss: float, mib: float) -> CriteriaReport:
    """A report whose loss and size are given."""
    tree = json.loads(Path(__file__).with_name("criteria.json").read_text())
    tree["storage"]["shipped_bytes"] = int(mib * 2**20)
    tree["accuracy"]["metrics"] = {"loss": {"value": loss, "low": loss, "high": loss}}
    return CriteriaReport.model_validate(tree)


@dataclass
class Making:
    """Hands that put a small entry into the store at once."""

    home: Home
    losses: dict[str, float] = field(default_factory=dict)
    made: list[Step] = field(default_factory=list)
    asked: list[GateVerdict] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    warned: list[str] = field(default_factory=list)
    diverging: float = 1e9

    def make(self, step: Step) -> Made:
        self.made.append(step)
        if step.title in self.broken:
            raise StageError("out of luck")
        if step.trial is not None and step.trial > self.diverging:
            raise DivergedError("gone")
        return Store(self.home.store).make(step.call, lambda out: self._fill(step, out))

    def _fill(self, step: Step, out: Path) -> dict[str, Any]:
        if step.call.stage == "evaluate":
            mib = 9.0 if step.label == "full" else 0.5
            found = report(self.loss(step), mib)
            (out / "criteria.json").write_text(found.model_dump_json())
            return {"figures": found.figures()}
        if step.call.stage == "compare":
            (out / "comparison.json").write_text(self.comparison(step).model_dump_json())
        if step.call.stage == "register":
            version = Registration(
                name="tiny",
                version="1",
                run_id="r",
                model_uri="models:/tiny/1",
                max_logit_difference=0.0,
                tolerance=0.0,
            )
            (out / "registration.json").write_text(version.model_dump_json())
        return {}

    def loss(self, step: Step) -> float:
        """As told; of a trial, how far its rate is from 0.01."""
        if step.trial is not None:
            return abs(step.trial - 0.01)
        return self.losses.get(step.label, 1.0) + (step.seed or 0)

    def comparison(self, step: Step) -> Comparison:
        """The mean of the losses, and no pairs."""
        spec = CompareSpec.model_validate(step.call.spec)
        assert set(step.call.inputs) == {f"{a}/{b}" for a in spec.labels for b in spec.seeds}
        seeds = {
            label: [self.losses.get(label, 1.0) + (i and seed) for i, seed in enumerate(spec.seeds)]
            for label in spec.labels
        }
        return Comparison(
            metric=spec.metric,
            more_is_better=spec.more_is_better,
            seeds=spec.seeds,
            candidates={
                label: {
                    "loss": Seeded(
                        value=statistics.mean(losses),
                        low=min(losses),
                        high=max(losses),
                        seeds=losses,
                    )
                }
                for label, losses in seeds.items()
            },
            pairs=[],
            how="",
        )

    def each(self, works: Mapping[str, Callable[[], T]], *, alone: bool = False) -> dict[str, T]:
        return fan_out(works, 1, lambda name, error: self.failed.update({name: str(error)}))

    def warn(self, words: str) -> None:
        self.warned.append(words)

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        self.asked.append(verdict)
        return verdict.passed


def told(calls: Calls, **losses: float) -> tuple[Outcome, Making]:
    hands = Making(calls.home, losses)
    return story(calls, hands), hands


def keys(calls: Calls) -> dict[str, str]:
    """Title: key of every step of the story."""
    _, hands = told(calls)
    return {step.title: key_of(step.call) for step in hands.made}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {title for title in before if before[title] != after.get(title)}
