"""How long `peftflow plan` takes to a first answer: new homes, nothing known of the machine.

    python benchmarks/first_answer.py [--quick]

Wall time of the command, the median of three runs, and the processor time of all its processes in
that run. The files that it reads are in the page cache after the first, which is not counted.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Result, at_most, write

ROOT = Path(__file__).parents[1]
RECIPES = ("quickstart", "methods-causal", "methods-banking77")
RUNS = 3
BAR_S = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the quickstart alone")
    quick = parser.parse_args().quick
    rows: list[Result] = []
    for name in RECIPES[:1] if quick else RECIPES:
        recipe = ROOT / "recipes" / f"{name}.yaml"
        first_answer(recipe)
        wall_s, cpu_s = sorted(first_answer(recipe) for _ in range(RUNS))[RUNS // 2]
        rows.append(at_most(f"{name}: wall", wall_s, "s", BAR_S))
        rows.append(Result(f"{name}: processor", round(cpu_s, 2), "s"))
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    write("first_answer", rows, quick=quick, notes=f"Load of 1, 5 and 15 minutes: {load}.")


def first_answer(recipe: Path) -> tuple[float, float]:
    """Seconds of the wall clock and of processors, user and system."""
    with tempfile.TemporaryDirectory() as home:
        before, start = processor_s(), time.perf_counter()
        subprocess.run(
            [sys.executable, "-P", "-m", "flows.cli", "plan", str(recipe), "--home", home],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - start, processor_s() - before


def processor_s() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
