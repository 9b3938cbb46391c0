"""What each room may import, shown by blocking the rest and importing every module."""

from __future__ import annotations

import ast
import shutil
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
    "turbo",
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


#: What code that travels with a version may import, beside itself and the standard library.
TRAVELS = {"torch", "transformers", "safetensors", "numpy"}


def test_what_travels_imports_nothing_else() -> None:
    found = set()
    for path in (ROOT / "tasks" / "speculate").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
    assert "torch" in found
    assert found - sys.stdlib_module_names <= TRAVELS


def test_what_travels_is_imported_where_it_was_copied_to(tmp_path: Path) -> None:
    """Alone in another place, under another name, without this project and without PEFT."""
    shutil.copytree(ROOT / "tasks" / "speculate", tmp_path / "elsewhere")
    names = [path.stem for path in (tmp_path / "elsewhere").glob("*.py")]
    inner = [f"elsewhere.{name}" for name in names if name != "__init__"]
    assert "elsewhere.decode" in inner
    blocked = [*SERVERS, *COMPUTE_BLOCKED, "tasks", "schemas", "flows", "pydantic"]
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    result = subprocess.run(
        [sys.executable, "-I", "-c", start + BLOCKER, ",".join(blocked), ",".join(inner)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("folder", ["flows", "tasks", "schemas", "tests", "benchmarks"])
def test_no_file_outgrows_one_reading(folder: str) -> None:
    """500 lines is the point at which a file here has taken on a second reason to exist."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in (ROOT / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert not long
