"""Models to decode with: two sizes, each tuned on two tasks by the project's own stages.

A subject is a merged LoRA with heads and prompts: on the embedded base, or on what the embedded
base became by it, grown to 128 M parameters (`grown.py`) and tuned further. Entries are kept in a
home, by key: what is there already is not made again.

    json    the quickstart: customer messages to JSON. Narrow: there are few ways to go on
    gsm8k   answers to sums in words, as the base's own 2,048 tokens, some 160 of them an answer.
            Open: names, numbers, prose. The model learns the language, and seldom the sums
"""

from __future__ import annotations

import itertools
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from speculation.grown import save_grown

from flows.calls import Calls
from flows.execute import run_stage
from flows.home import Home
from schemas.load import load_recipe
from schemas.stages import Call
from schemas.turbo import Turbo
from tasks.core.store import Entry, Store

RECIPES = Path(__file__).parents[2] / "recipes"
QUICKSTART = RECIPES / "quickstart"
BASE = QUICKSTART / "base"

#: The heads of all subjects. Half as many texts as by default, read as often again.
TURBO = Turbo(prompts=1000, epochs=12)

#: Of the grown base: times as wide, blocks, and how far apart copies start.
TIMES, LAYERS, NOISE = 4, 10, 0.4
SIZES = ("embedded", "grown")


@dataclass(frozen=True)
class Task:
    """rows: of the train file, the first. answer: tokens that an answer may have. epochs, rate:
    by size of the model."""

    train: Path
    test: Path
    columns: dict[str, str]
    rows: int
    max_length: int
    answer: int
    epochs: dict[str, float]
    rate: dict[str, float]


TASKS = {
    "json": Task(
        train=QUICKSTART / "train.jsonl",
        test=QUICKSTART / "test.jsonl",
        columns={},
        rows=2602,
        max_length=128,
        answer=64,
        epochs={"embedded": 8, "grown": 0.3},
        rate={"embedded": 5e-3, "grown": 3e-5},
    ),
    "gsm8k": Task(
        train=RECIPES / "data" / "gsm8k_train.jsonl",
        test=RECIPES / "data" / "gsm8k_test.jsonl",
        columns={"prompt": "question", "completion": "answer"},
        rows=1000,
        max_length=448,
        answer=64,
        epochs={"embedded": 4, "grown": 0.5},
        rate={"embedded": 5e-3, "grown": 2e-4},
    ),
}


@dataclass(frozen=True)
class Subject:
    """One tuned model. base: directory. rows, lora, merged: entries."""

    task: Task
    base: Path
    home: Home
    calls: Calls
    rows: Entry
    lora_call: Call
    lora: Entry
    merged: Entry

    def heads(self, turbo: Turbo) -> Entry:
        return made(self.calls.turbo("", turbo, self.rows, self.merged).call, self.home)

    def trained_again(self, turbo: Turbo) -> tuple[Entry, Entry]:
        """LoRA and heads once more, one right after the other: to compare how long each takes."""
        again = Home(self.home.root / "again")
        shutil.rmtree(again.root, ignore_errors=True)
        for folder in (again.cache, again.logs, again.store):
            folder.mkdir(parents=True)
        for stage in ("prepare", "merge"):
            (again.store / stage).symlink_to(self.home.store / stage)
        calls = (self.lora_call, self.calls.turbo("", turbo, self.rows, self.merged).call)
        lora, heads = (made(call, again) for call in calls)
        return lora, heads


def subject(size: str, name: str, work: Path, rows: int | None = None) -> Subject:
    """The model of this size for this task, made now if it is not there.

    rows: at most so many train rows, in place of the task's number.
    """
    task, base = TASKS[name], BASE
    if size == "grown":
        small = subject("embedded", name, work, rows)
        base = work / f"grown-{small.merged.key[:12]}-{TIMES}x-{LAYERS}-{NOISE}"
        save_grown(small.merged.path / "model", base, TIMES, LAYERS, NOISE)
    home = Home(work / "home")
    home.cache.mkdir(parents=True, exist_ok=True)
    home.logs.mkdir(exist_ok=True)
    count = min(rows or task.rows, task.rows)
    path = work / f"{size}-{name}-{count}.yaml"
    path.write_text(yaml.safe_dump(recipe(size, name, base, cut(task.train, count, work))))
    loaded = load_recipe(path)
    calls = Calls(loaded, path, home)
    prepared = made(calls.prepare().call, home)
    training = calls.train(loaded.candidates[0], prepared).call
    lora = made(training, home)
    merged = made(calls.merge("", prepared, lora).call, home)
    return Subject(task, base, home, calls, prepared, training, lora, merged)


def recipe(size: str, name: str, base: Path, train: Path) -> dict[str, Any]:
    task = TASKS[name]
    return {
        "name": f"{size}-{name}",
        "task": "causal-lm",
        "base": {"model": str(base), "dtype": "bfloat16"},
        "data": {
            "train": {"path": str(train), "columns": task.columns},
            "test": {"path": str(task.test), "columns": task.columns},
            "max_length": task.max_length,
            "test_rows": 256,
        },
        "candidates": [{"method": "lora", "rank": 16, "alpha": 32, "target_modules": "all-linear"}],
        "train": {
            "epochs": task.epochs[size],
            "learning_rate": task.rate[size],
            "batch_tokens": 2048,
            "seed": 0,
        },
        "evaluate": {"max_new_tokens": task.answer},
        "select": {"maximize": "exact_match"},
        "finish": {"merge": True},
        "register": {"name": "none"},
    }


def cut(path: Path, rows: int, work: Path) -> Path:
    """The first rows of a file, as a file."""
    out = work / f"{rows}-{path.name}"
    with path.open() as file:
        out.write_text("".join(itertools.islice(file, rows)))
    return out


def made(call: Call, home: Home) -> Entry:
    found = Store(home.store).find(call)
    if found is None:
        print(f"making {call.stage}", file=sys.stderr, flush=True)
        found = run_stage(call, home, lambda event: None)
    return found
