"""The shipped recipe of images with few steps: its own calls, made in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.calls import Calls, Step
from flows.home import Home
from schemas.load import load_recipe
from schemas.stages import EvaluateSpec, InspectSpec, MergeSpec, PrepareSpec, TrainSpec
from tasks.core.store import Entry, Store
from tasks.evaluate.stage import run as evaluate
from tasks.inspect.stage import run as inspect
from tasks.merge.stage import run as merge
from tasks.prepare.stage import run as prepare
from tasks.train.stage import run as train

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits.yaml"
CHANGES = ["train.max_steps=40", "base.dtype=float32", "evaluate.bootstrap=100"]
STAGES: dict[str, tuple[Any, Any]] = {
    "inspect": (InspectSpec, inspect),
    "prepare": (PrepareSpec, prepare),
    "train": (TrainSpec, train),
    "evaluate": (EvaluateSpec, evaluate),
    "merge": (MergeSpec, merge),
}


def made(step: Step, store: Store) -> Entry:
    """A step's entry, as its own process would make it."""
    spec_type, run = STAGES[step.call.stage]
    spec = spec_type.model_validate(step.call.spec)
    paths = {name: Path(path) for name, path in step.call.paths.items()}
    return store.make(step.call, lambda out: run(spec, paths, out))


def test_letters_become_digits(tmp_path: Path) -> None:
    """From a base that knows letters, in 40 steps of low-rank updates; merged, the same answers."""
    home = Home(tmp_path)
    home.open()
    store = Store(home.store)
    calls = Calls(load_recipe(RECIPE, CHANGES), RECIPE, home)
    counted = made(calls.inspect(), store).facts["candidates"]
    assert set(counted) == {"full", "lora-r8", "bottleneck-sequential-8", "bitfit"}
    rows = made(calls.prepare(), store)
    splits = rows.facts["splits"]
    assert [splits[name]["rows_kept"] for name in ("train", "test")] == [898, 899]
    assert splits["train"]["tokens"] == 898 * 17

    lora = calls.recipe.candidates[1]
    step = calls.train(lora, rows)
    trained = made(step, store)
    scored = made(calls.score(step, rows, trained), store)
    merged = made(calls.merge(lora.label, rows, trained), store)
    finished = made(calls.score(step, rows, merged), store)
    # Ten labels: 0.1 by chance.
    assert scored.facts["figures"]["accuracy"] > 0.8
    found = scored.facts["figures"]["loss"]
    # W + BA is rounded to the base's bfloat16, 8 bits, once.
    assert finished.facts["figures"]["loss"] == pytest.approx(found, abs=5e-3)
    labels = json.loads((rows.path / "labels.json").read_text())
    assert labels == [str(digit) for digit in range(10)]
