"""A promoted version loaded where this project is not: in a new virtual environment.

    python benchmarks/clean_env.py [--home DIR] [--name NAME] [--quick]

Makes an environment with the requirements that the version lists and nothing else, loads
`models:/NAME@champion` there with MLflow alone, asks it the version's own input example, and
compares the answers with those of this environment. pip uses the index that it is configured
with. Where nothing is promoted yet, the quickstart is run first. A short run is the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from common import Result, at_most, write

from tasks.register import registry
from tasks.register.promote import champion

ROOT = Path(__file__).resolve().parents[1]

#: Runs in the new environment: no project in reach, the registry's address in the environment.
STRANGER = """
import importlib.util, json, sys, time
from importlib import metadata

ours = [name for name in ("tasks", "flows", "schemas", "prefect", "polars")
        if importlib.util.find_spec(name)]
started = time.perf_counter()
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
loaded = time.perf_counter()
rows = json.loads(sys.argv[2])
answers = model.predict(rows).to_dict("list")
print(json.dumps({
    "ours": ours,
    "load_s": loaded - started,
    "predict_s": time.perf_counter() - loaded,
    "answers": answers,
    "packages": len(list(metadata.distributions())),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, default=ROOT / ".peftflow")
    parser.add_argument("--name", help="a registered model; by default the one that is promoted")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    home = arguments.home.resolve()
    client = registry.connect(registry.tracking_uri(home))
    name = arguments.name or promoted_name(client, home)
    version = champion(home, name)
    if version is None:
        sys.exit(f"{name} has no champion in {home}")
    record = registry.get_version(client, name, version)
    stored = registry.stored_files(record)
    requirements = (stored / "requirements.txt").read_text().split()
    rows = example(stored)
    here = ask(Path(sys.executable), home, name, rows)
    with tempfile.TemporaryDirectory(prefix="clean-env-") as directory:
        started = time.perf_counter()
        python = make_environment(Path(directory), requirements)
        install_s = time.perf_counter() - started
        there = ask(python, home, name, rows)
        size_mb = sum(p.stat().st_size for p in Path(directory).rglob("*") if p.is_file()) / 1e6
    for row, answer in zip(rows, zip(*there["answers"].values(), strict=True), strict=True):
        print(f"{row!r}\n    -> {answer!r}")
    write(
        "clean_env",
        [
            Result("version", f"{name} {version}", "champion"),
            Result("requirements that it lists", len(requirements), "packages"),
            Result("packages in the new environment", there["packages"], "packages"),
            Result("size of the new environment", size_mb, "MB"),
            Result("making the environment", install_s, "s"),
            Result("load_model, imports included", there["load_s"], "s"),
            Result(f"predict, {len(rows)} rows", there["predict_s"], "s"),
            at_most("parts of this project within its reach", len(there["ours"]), "modules", 0),
            at_most("answers that differ from here", differing(here, there), "rows", 0),
        ],
        quick=arguments.quick,
        notes="Requirements: " + ", ".join(requirements),
    )


def promoted_name(client: Any, home: Path) -> str:
    """A model that has a champion; the quickstart's, made now, where there is none."""
    names = [model.name for model in client.search_registered_models()]
    promoted = [name for name in names if champion(home, name) is not None]
    if promoted:
        return str(promoted[0])
    peftflow = Path(sys.executable).with_name("peftflow")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    subprocess.run([peftflow, "run", recipe, "--home", home], check=True)
    return "quickstart"


def example(stored: Path) -> list[str]:
    """The version's own input example: a list of texts."""
    return [str(row) for row in json.loads((stored / "input_example.json").read_text())]


def make_environment(directory: Path, requirements: list[str]) -> Path:
    """A new virtual environment with these packages; its Python."""
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
    return python


def ask(python: Path, home: Path, name: str, rows: list[str]) -> dict[str, Any]:
    """Load the champion and ask it, in a process that stands outside the project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "MLFLOW_TRACKING_URI": registry.tracking_uri(home),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.run(
        [python, "-I", "-c", STRANGER, f"models:/{name}@champion", json.dumps(rows)],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(process.stdout.splitlines()[-1]))


def differing(here: dict[str, Any], there: dict[str, Any]) -> int:
    """Rows whose answer differs in any column; scores may differ by rounding, 1e-5."""
    count = 0
    columns = here["answers"].keys()
    rows_here = zip(*(here["answers"][name] for name in columns), strict=True)
    rows_there = zip(*(there["answers"][name] for name in columns), strict=True)
    for one, other in zip(rows_here, rows_there, strict=True):
        same = all(
            abs(a - b) < 1e-5 if isinstance(a, float) else a == b
            for a, b in zip(one, other, strict=True)
        )
        count += not same
    return count


if __name__ == "__main__":
    main()
