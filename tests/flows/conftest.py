"""A small real recipe, and the command line as a process."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "recipes" / "quickstart"

HEAVY = {"torch", "transformers", "prefect", "mlflow", "pandas", "polars", "plotly"}

#: One candidate, few steps, few rows: every stage real, nothing worth keeping.
TINY: dict[str, Any] = {
    "name": "tiny",
    "task": "causal-lm",
    "base": {"model": str(QUICKSTART / "base")},
    "data": {
        "train": {"path": str(QUICKSTART / "train.jsonl")},
        "test": {"path": str(QUICKSTART / "test.jsonl")},
        "max_length": 128,
        "test_rows": 8,
    },
    "candidates": [{"method": "lora", "rank": 4, "target_modules": ["q_proj"]}],
    "train": {"max_steps": 4, "batch_tokens": 256, "learning_rate": 1e-3},
    "evaluate": {
        "max_new_tokens": 4,
        "generate_rows": 2,
        "batch_sizes": [1],
        "prompt_tokens": 16,
        "repeats": 3,
        "bootstrap": 100,
    },
    "select": {"minimize": "loss"},
    "register": {"name": "tiny", "gate": {"loss": "<= 100"}, "promote": True},
}


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        """The JSON object that `--json` prints last on standard output."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def environment() -> dict[str, str]:
    """This process's, without what would point a command at another home or server."""
    away = ("PEFTFLOW_HOME", "PREFECT_API_URL", "PREFECT_HOME")
    return {
        name: value
        for name, value in os.environ.items()
        # MLflow puts its own into the environment of whatever test has used it.
        if name not in away and not name.startswith("MLFLOW_")
    }


@pytest.fixture(scope="session")
def peftflow() -> Callable[..., Ended]:
    """`peftflow ARGUMENTS` in a process of its own.

    python: options of the interpreter. variables: of the environment, besides this process's.
    """

    def run(
        *arguments: object, python: tuple[str, ...] = (), variables: dict[str, str] | None = None
    ) -> Ended:
        command = [sys.executable, *python, "-m", "flows.cli", *map(str, arguments)]
        around = environment() | (variables or {})
        done = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """`peftflow ARGUMENTS`, started and not waited for."""

    def run(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet, text=True
        )

    return run


@pytest.fixture(scope="session")
def tree() -> dict[str, Any]:
    """TINY, to be changed."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe file of TINY."""
    if not (QUICKSTART / "base" / "model.safetensors").exists():
        pytest.skip("recipes/quickstart/base is not there")
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def processes_naming() -> Callable[[str], list[str]]:
    """The command lines of the processes, but this one, in which a text occurs."""

    def find(text: str) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line and path.parent.name != str(os.getpid()):
                found.append(line)
        return found

    return find


@pytest.fixture(scope="session")
def heavy_imports() -> Callable[[str], set[str]]:
    """Which of the libraries that take long to import stand in `python -X importtime`'s output."""

    def find(importtime: str) -> set[str]:
        lines = (line for line in importtime.splitlines() if line.startswith("import time:"))
        return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines} & HEAVY

    return find


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with rows and what looks like a base."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path
