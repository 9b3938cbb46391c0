"""What `peftflow plan` says each candidate would cost on a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.calls import Calls, Step
from flows.execute import ROOT, run_stage
from flows.home import Home
from flows.machine import fingerprint, resolve_dtype
from flows.remember import Memory
from schemas.errors import StageError, UserError
from schemas.recipe import Recipe
from schemas.stages import Call, CostSpec
from tasks.core.files import sha256_json
from tasks.core.store import Entry, Store

SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(MiB|GiB|TiB)\s*$", re.IGNORECASE)
UNITS = {"mib": 1.0, "gib": 1024.0, "tib": 1024.0**2}
#: What training reaches of the rate of bare products. Measured (docs/plan.md) on a machine with
#: other work, so a guide and no promise.
EFFICIENCY = {"float32": 0.6, "bfloat16": 0.2}


@dataclass(frozen=True)
class Costs:
    """candidates: as `tasks/cost/stage.py` writes them. device_mib: what there is to fit into.
    rate: FLOP/s that training may reach here; None where that is not known."""

    candidates: dict[str, dict[str, Any]]
    device_mib: float
    device: str
    rate: float | None
    prepared: bool


def costs(recipe: Recipe, calls: Calls | None, home: Home, device: str | None) -> Costs:
    """Each candidate's costs; from the store where they were found before.

    calls: None where the recipe gives a shape in place of a base.

    Raises:
        UserError: a device that is no size, or a candidate that cannot be built.
    """
    size = size_mib(device) if device else available_mib()
    dtype = calls.dtype if calls else resolve_dtype(recipe.base.dtype, home)
    step = cost_step(recipe, calls, home, dtype)
    store = Store(home.store)
    entry = store.find(step.call) or run_stage(step.call, home, lambda event: None)
    record = json.loads((entry.path / "plan.json").read_text())
    speed = rates(home).get(dtype)
    return Costs(
        record["candidates"],
        size,
        device or "this machine now",
        None if speed is None else speed * EFFICIENCY[dtype],
        "prepared" in step.call.inputs,
    )


def cost_step(recipe: Recipe, calls: Calls | None, home: Home, dtype: str) -> Step:
    """The call that makes the costs. It reads rows only where they are prepared already."""
    spec = CostSpec.model_validate(
        {
            "task": recipe.task,
            "shape": recipe.base.shape,
            "candidates": [c.model_dump(mode="json") for c in recipe.candidates],
            "train": recipe.train,
            "evaluate": recipe.evaluate,
            "max_length": recipe.data.max_length,
            "dtype": dtype,
        }
    )
    paths: dict[str, str] = {}
    inputs: dict[str, str] = {}
    outside: dict[str, str] = {}
    if calls is not None:
        inspected = calls.inspect().call
        paths, outside = dict(inspected.paths), dict(inspected.outside)
        rows: Entry | None = Store(home.store).find(calls.prepare().call)
        if rows is not None:
            paths["prepared"], inputs["prepared"] = str(rows.path), rows.key
    call = Call(
        stage=spec.STAGE,
        stage_version=spec.VERSION,
        format="report",
        spec=spec.model_dump(mode="json"),
        unkeyed=spec.UNKEYED,
        paths=paths,
        inputs=inputs,
        outside=outside,
    )
    return Step(call)


def rates(home: Home) -> dict[str, float]:
    """`tasks.cost.calibrate`, once for each machine."""
    memory = Memory(home.cache / "machine.json")
    key = f"products {fingerprint()} {sha256_json(os.cpu_count())[:8]}"
    answer = memory.get(key)
    if not isinstance(answer, dict):
        child = subprocess.run(
            [sys.executable, "-P", "-m", "tasks.cost.calibrate"],
            env=home.environment() | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if child.returncode != 0:
            raise StageError(f"products cannot be timed:\n{child.stderr[-2000:]}")
        answer = json.loads(child.stdout.splitlines()[-1])
        memory.put(key, answer)
    return {name: float(value) for name, value in answer.items()}


def size_mib(text: str) -> float:
    """`24GiB` in MiB.

    Raises:
        UserError: it is no size.
    """
    match = SIZE.match(text)
    if match is None:
        raise UserError.at("--device", f"{text!r} is no size", "write e.g. --device 24GiB")
    return float(match[1]) * UNITS[match[2].lower()]


def available_mib() -> float:
    """What this machine, or our cgroup, has left."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    free = int(fields["MemAvailable"].split()[0]) / 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, (int(text) - used) / 2**20)
    return free


def fits(cost: dict[str, Any], device_mib: float) -> str:
    """yes, or no with what to change first."""
    memory = cost["training_mib"]
    if memory["total"] <= device_mib:
        return "yes"
    held = memory["weights"] + memory["gradients"] + memory["optimiser"] + memory["rest"]
    if held > device_mib:
        learned = memory["gradients"] + memory["optimiser"]
        return "no: train less" if learned > memory["weights"] else "no: smaller base or 4 bits"
    if not cost["gradient_checkpointing"]:
        return "no: gradient_checkpointing"
    return "no: less micro_batch_tokens"
