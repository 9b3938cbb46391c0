"""The two recipes for real input, end to end, over several seeds: the figures of docs/results.md.

    python benchmarks/real_input.py [--only banking77|gsm8k] [--seeds 3] [--quick]

Runs `peftflow run` as a user would, in a home of its own, and reads its JSON. Needs
recipes/data and recipes/models (docs/results.md says how to fill them).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Result, at_least, at_most, write

ROOT = Path(__file__).parents[1]
PEFTFLOW = Path(sys.executable).with_name("peftflow")

#: `generate()` from the promoted version, in a process that has only mlflow.
GENERATE = """
import sys, mlflow
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[1]}@champion")
print(model.predict([sys.argv[2]]))
"""


def run(recipe: str, home: Path, *overrides: str) -> dict[str, Any]:
    """One `peftflow run`, its screen passed on, its JSON returned."""
    command = [str(PEFTFLOW), "run", str(ROOT / "recipes" / recipe), "--home", str(home), "--json"]
    for override in overrides:
        command += ["--set", override]
    print("$", " ".join(["peftflow", *command[1:]]), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    *screen, last = done.stdout.rstrip().splitlines()
    print("\n".join(screen), flush=True)
    if done.returncode not in (0, 3):
        sys.exit(f"{recipe} ended with {done.returncode}: {last}")
    record: dict[str, Any] = json.loads(last)
    return record


def interval(values: list[float]) -> str:
    """Mean and, over seeds, the 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.4f} (one seed)"
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.4f} ± {half:.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def banking77(home: Path, seeds: int, quick: bool) -> list[Result]:
    """Full fine-tuning and LoRA on MiniLM: test accuracy over seeds."""
    extra = ["train.max_steps=20", "register.gate={}"] if quick else []
    accuracy: dict[str, list[float]] = {}
    for seed in range(seeds):
        record = run("banking77.yaml", home, f"train.seed={seed}", *extra)
        for candidate in record["candidates"]:
            found = accuracy.setdefault(candidate["label"], [])
            found.append(candidate["figures"]["accuracy"])
    full, lora = accuracy["full"], accuracy["lora-r16"]
    gap = 100 * (statistics.mean(full) - statistics.mean(lora))
    return [
        Result("banking77 full, test accuracy over seeds", interval(full), ""),
        Result("banking77 LoRA r=16, test accuracy over seeds", interval(lora), ""),
        at_least("banking77 full, mean test accuracy", statistics.mean(full), "share", 0.925),
        at_most("banking77 LoRA behind full", gap, "points", 0.5),
    ]


def gsm8k(home: Path, quick: bool) -> list[Result]:
    """stories260K on worked answers: held-out loss before and after, and what was forgotten."""
    extra = ["train.max_steps=20", "data.test_rows=40"] if quick else []
    record = run("gsm8k.yaml", home, *extra)
    base = record["base"]["figures"]
    rows = [Result("gsm8k base, held-out answer loss", base["loss"], "nats a token")]
    for candidate in record["candidates"]:
        label, figures = candidate["label"], candidate["figures"]
        rows += [
            at_most(f"gsm8k {label}, loss to base", figures["loss"] / base["loss"], "ratio", 0.5),
            Result(f"gsm8k {label}, held-out answer loss", figures["loss"], "nats a token"),
            Result(f"gsm8k {label}, retention change", figures["retention_change"], "nats a token"),
        ]
    question = "A baker makes 12 cakes and sells 5. How many cakes are left?"
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{(home / 'mlflow' / 'mlflow.db').resolve()}"
    }
    with tempfile.TemporaryDirectory() as elsewhere:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", GENERATE, record["registered"]["name"], question],
            env=environment,
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    rows.append(Result("gsm8k champion says, in a fresh process", answer[:160], ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["banking77", "gsm8k"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--home", type=Path, help="kept; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed: does it run")
    arguments = parser.parse_args()
    if not (ROOT / "recipes" / "data").exists():
        print("skipped: recipes/data is absent, docs/results.md says how to fill it")
        return
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.home or Path(temporary)
        rows: list[Result] = []
        if arguments.only != "gsm8k":
            seeds = 1 if arguments.quick else arguments.seeds
            rows += banking77(home / "banking77", seeds, arguments.quick)
        if arguments.only != "banking77":
            rows += gsm8k(home / "gsm8k", arguments.quick)
    name = "real_input" if arguments.only is None else f"real_input_{arguments.only}"
    write(name, rows, quick=arguments.quick)


if __name__ == "__main__":
    main()
