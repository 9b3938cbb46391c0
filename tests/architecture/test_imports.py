"""What each room may import, shown by blocking the rest and importing every module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: The rooms that must import on a GPU machine with torch, transformers, peft, accelerate,
#: safetensors, numpy and pydantic alone.
COMPUTE = (
    "core",
    "methods",
    "speculate",
    "inspect",
    "cost",
    "train",
    "evaluate",
    "merge",
    "export",
)
COMPUTE_BLOCKED = ["polars", "pandera", "datasets", "plotly", "jinja2", "pyarrow", "pandas"]
SERVERS = ["prefect", "mlflow", "typer", "rich"]

BLOCKER = """
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
BLOCKED = set(sys.argv[1].split(","))
if "transformers" not in BLOCKED:
    # Libraries that look for optional ones (datasets, pandas) do so in their own try blocks.
    import torch, transformers, peft, accelerate, safetensors.torch
    for name in list(sys.modules):
        if name.split(".")[0] in BLOCKED:
            del sys.modules[name]
sys.meta_path.insert(0, Blocker())
for module in sys.argv[2].split(","):
    importlib.import_module(module)
loaded = {name.split(".")[0] for name in sys.modules} & BLOCKED
assert not loaded, loaded
"""


def modules(*folders: str) -> list[str]:
    """Every module of these folders; a `__main__` does nothing when it is only imported."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found.append(".".join(parts))
    return found


def import_all(names: list[str], blocked: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKER, ",".join(blocked), ",".join(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_tasks_and_schemas_need_no_server_and_no_command_line() -> None:
    # served_model is read by mlflow alone, as the code of a registered model.
    served = "tasks.register.served_model"
    names = [name for name in modules("tasks", "schemas") if name != served]
    assert {"tasks.register.registry", "tasks.train.__main__"} <= set(names)
    result = import_all(names, SERVERS)
    assert result.returncode == 0, result.stderr


def test_compute_rooms_need_the_bare_gpu_machine_alone() -> None:
    names = modules(*(f"tasks/{room}" for room in COMPUTE))
    result = import_all(names, SERVERS + COMPUTE_BLOCKED)
    assert result.returncode == 0, result.stderr


def test_schemas_need_no_torch() -> None:
    names = [name for name in modules("schemas") if name != "schemas.rows"]
    result = import_all(names, [*SERVERS, *COMPUTE_BLOCKED, "torch", "transformers", "peft"])
    assert result.returncode == 0, result.stderr


def test_the_blocker_blocks_what_is_left_out_above() -> None:
    """Else the exception would outlive its reason, or the blocker let everything through."""
    result = import_all(["tasks.register.served_model"], SERVERS)
    assert result.returncode != 0
    assert "mlflow is blocked" in result.stderr


@pytest.mark.parametrize("folder", ["flows", "tasks", "schemas", "tests", "benchmarks"])
def test_no_file_outgrows_one_reading(folder: str) -> None:
    """500 lines is the point at which a file here has taken on a second reason to exist."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert not long
