"""What comparing candidates costs, against running each of them by itself.

    python benchmarks/comparing.py [RECIPE] [--home DIR] [--jobs N] [--alone CANDIDATE]

Reads the record of the recipe's last run in DIR (`peftflow run RECIPE --home DIR`), or of one that
it makes itself: what each stage took when it was made. A run of one candidate makes the same
stages for itself alone: the rows, the base's own figures, its search, trainings and evaluation, and
what follows a selection (merge, the finished model's evaluation, comparison, report, registration).
Their sum over all candidates is what single runs cost; stages that are cached cost nothing twice.

With --alone one candidate is really run by itself in an empty home, to check that arithmetic. Times
with --jobs are those of stages that shared the machine, so the ratio counts stage seconds on both
sides.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import Result, at_most, write

from schemas.load import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "methods-causal.yaml"
QUICK = ["seeds=[0]", "search=null", "train.max_steps=20", "data.test_rows=32"]

#: Made once for all candidates, and once for each single run.
SHARED = ("inspect", "prepare", "compare", "merge", "report", "register")


def shares(record: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Stage seconds that every single run would spend, and those of each candidate's own."""
    shared, own = 0.0, {subject["label"]: 0.0 for subject in record["candidates"]}
    for line in record["stages"]:
        seconds = line["seconds"] or 0.0
        if line["label"] in own and line["stage"] not in SHARED:
            own[line["label"]] += seconds
        else:
            shared += seconds
    return shared, own


def last_record(home: Path, name: str) -> dict[str, Any]:
    for path in sorted((home / "runs").glob("*.json"), reverse=True):
        record = json.loads(path.read_text())
        if record["name"] == name and record["state"] in ("done", "refused"):
            return dict(record)
    raise SystemExit(f"{home} has no finished run of {name}")


def run(recipe: Path, home: Path, jobs: int, overrides: list[str]) -> float:
    """Wall seconds of a recipe in a home."""
    command = [sys.executable, "-m", "flows.cli", "run", str(recipe), "--home", str(home)]
    began = time.monotonic()
    for override in overrides:
        command += ["--set", override]
    ended = subprocess.run([*command, "--jobs", str(jobs)], check=False)
    if ended.returncode not in (0, 3):  # 3: the gate refused, and all is measured
        raise SystemExit(f"{recipe.name} ended with {ended.returncode}")
    return time.monotonic() - began


def run_alone(recipe: Path, label: str, jobs: int, overrides: list[str]) -> float:
    """Wall seconds of one candidate by itself in an empty home."""
    tree = yaml.safe_load(recipe.read_text())
    labels = [candidate.label for candidate in load_recipe(recipe).candidates]
    tree["candidates"] = [tree["candidates"][labels.index(label)]]
    tree["select"].pop("subject_to", None)
    alone = recipe.with_name(f".alone-{recipe.name}")
    alone.write_text(yaml.safe_dump(tree))
    try:
        with tempfile.TemporaryDirectory() as home:
            return run(alone, Path(home), jobs, overrides)
    finally:
        alone.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("--home", type=Path, help="where it was run; none: it is run now")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--alone", help="the candidate that is really run by itself")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed, no search")
    arguments = parser.parse_args()
    overrides = QUICK if arguments.quick else []
    with tempfile.TemporaryDirectory() as empty:
        home = arguments.home or Path(empty)
        if arguments.home is None:
            run(arguments.recipe, home, arguments.jobs, overrides)
        record = last_record(home, yaml.safe_load(arguments.recipe.read_text())["name"])
    shared, own = shares(record)
    joint, single = shared + sum(own.values()), sum(shared + seconds for seconds in own.values())
    rows = [
        Result("candidates", len(own), ""),
        Result("seeds", len(record["seeds"]), ""),
        Result("stages that all share", round(shared, 1), "s"),
        *(Result(f"own stages of {label}", round(own[label], 1), "s") for label in own),
        Result("together", round(joint, 1), "s of stages"),
        Result("each by itself", round(single, 1), "s of stages"),
        at_most("together, each by itself = 1", joint / single, "×", 1.0),
    ]
    if arguments.alone:
        sum_s = shared + own[arguments.alone]
        rows.append(Result(f"{arguments.alone} alone, from the sum above", round(sum_s, 1), "s"))
        measured = run_alone(arguments.recipe, arguments.alone, arguments.jobs, overrides)
        rows.append(Result(f"{arguments.alone} alone, really run", round(measured, 1), "s"))
    write(
        f"comparing_{arguments.recipe.stem.removeprefix('methods-')}", rows, quick=arguments.quick
    )


if __name__ == "__main__":
    main()
