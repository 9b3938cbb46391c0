"""What `peftflow plan` says each candidate would cost on a device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.calls import Calls, cost_spec
from flows.execute import ahead, run_stage
from flows.home import Home
from flows.machine import known_dtype, resolve_dtype
from flows.rate import Rate
from flows.search import trials_of, wants_search
from schemas.cost import Cost, CostReport
from schemas.errors import UserError
from schemas.recipe import Recipe
from schemas.stages import Call, CostSpec
from tasks.core.store import Entry, Store

SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(MiB|GiB|TiB)\s*$", re.IGNORECASE)
UNITS = {"mib": 1.0, "gib": 1024.0, "tib": 1024.0**2}
#: What training reaches of the rate of bare products. Measured (docs/plan.md) on a machine with
#: other work, so a guide and no promise.
EFFICIENCY = {"float32": 0.6, "bfloat16": 0.2}


#: Makes the entry of a cost call.
Make = Callable[[Call], Entry]


@dataclass(frozen=True)
class Costs:
    """candidates: by label. device_mib: what there is to fit into. rate: FLOP/s that training may
    reach here. trainings, flops: of all seeds and trials; None where
    rows are not prepared."""

    candidates: dict[str, Cost]
    device_mib: float
    device: str
    rate: float
    prepared: bool
    trainings: int
    flops: float | None


@contextmanager
def maker(recipe: Recipe, home: Home) -> Iterator[Make]:
    """What makes the entry of a cost call: its own process, once it is asked. Where the machine has
    to be asked for its dtype first the process starts at once, as the two import for as long."""
    if known_dtype(recipe.base.dtype, home) is None:
        with ahead(CostSpec.STAGE, home) as make:
            yield make
    else:
        yield lambda call: run_stage(call, home, lambda event: None)


def costs(
    recipe: Recipe,
    calls: Calls | None,
    home: Home,
    device: str | None,
    make: Make,
    rate: Rate,
) -> Costs:
    """Each candidate's costs; from the store where they were found before.

    calls: None where the recipe gives a shape in place of a base. make: see `maker`. rate: what
    says how fast this machine multiplies, asked when nothing else runs.

    Raises:
        UserError: a device that is no size, or a candidate that cannot be built.
    """
    size = size_mib(device) if device else available_mib()
    store = Store(home.store)
    if calls is None:
        dtype = resolve_dtype(recipe.base.dtype, home)
        call = shape_call(recipe, dtype)
    else:
        dtype = calls.dtype
        call = calls.cost(store.find(calls.prepare().call)).call
    entry = store.find(call) or make(call)
    found = CostReport.model_validate_json((entry.path / "plan.json").read_bytes()).candidates
    trainings, flops = in_all(recipe, found)
    return Costs(
        found,
        size,
        device or "this machine now",
        rate(dtype) * EFFICIENCY[dtype],
        "prepared" in call.inputs,
        trainings,
        flops,
    )


def shape_call(recipe: Recipe, dtype: str) -> Call:
    """The call that makes the costs of a base that is a shape alone."""
    spec = cost_spec(recipe, dtype)
    return Call(
        stage=spec.STAGE,
        stage_version=spec.VERSION,
        format="report",
        spec=spec.model_dump(mode="json"),
        unkeyed=spec.UNKEYED,
        paths={},
    )


def in_all(recipe: Recipe, found: dict[str, Cost]) -> tuple[int, float | None]:
    """How often a run trains, and the FLOPs of that: every seed, and the trials of a search.

    A trial is a share of the training, and where its length goes by epochs, on fewer rows.
    """
    trainings, flops = 0, 0.0
    known = True
    for candidate in recipe.candidates:
        if not candidate.TRAINS:
            continue
        own, whole = found[candidate.label].flops, len(recipe.all_seeds)
        trainings, share = trainings + whole, float(whole)
        if (search := recipe.search) is not None and wants_search(candidate, search):
            trials = trials_of(search)
            by_steps = (candidate.train.max_steps or recipe.train.max_steps) is not None
            trainings += trials
            share += trials * search.share * (1.0 if by_steps else 1 - search.holdout)
        known = known and own is not None
        flops += share * (own or 0.0)
    return trainings, flops if known else None


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


def fits(cost: Cost, device_mib: float) -> str:
    """yes, or no with what to change first."""
    memory = cost.training_mib
    if memory is None:
        return "yes" if cost.inference_mib <= device_mib else "no: smaller base"
    if memory["total"] <= device_mib:
        return "yes"
    held = memory["weights"] + memory["gradients"] + memory["optimiser"] + memory["rest"]
    if held > device_mib:
        learned = memory["gradients"] + memory["optimiser"]
        return "no: train less" if learned > memory["weights"] else "no: smaller base or 4 bits"
    if not cost.gradient_checkpointing:
        return "no: gradient_checkpointing"
    return "no: less micro_batch_tokens"
