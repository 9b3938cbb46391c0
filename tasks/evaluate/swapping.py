"""Several adapters on one loaded base: what a swap costs, what ten weigh, and what comes back.

One base serves many tasks only if going from one adapter to another is cheap and leaves nothing
behind. So the subject's adapter is loaded with nine others, which are files of their own like
those of other tasks: its weights, each set scaled by another factor. What is drawn and not learned
(VeRA's projections, which all adapters on a base share) is the same in each.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from schemas.report import Swapping
from tasks.core import adapters, quantised, runtime
from tasks.core.progress import warn
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import run_on
from tasks.evaluate.latency import quiet, wait
from tasks.evaluate.pairs import first_rows
from tasks.evaluate.subject import Subject

ADAPTERS = 10
#: Times that each adapter's turn comes.
ROUNDS = 2
ROWS = 8
#: What PEFT calls them.
NAMES = [adapters.FIRST, *(f"other{number}" for number in range(1, ADAPTERS))]

HOW = (
    f"the adapter and {ADAPTERS - 1} others of its shapes, loaded from files of their own, on one "
    f"base: median of {ADAPTERS * ROUNDS} changes from one to the next; MiB of all tensors beside "
    f"the base's; logits of {ROWS} test rows after coming back, beside a fresh load's, bit for bit"
)
WHOLE = "not measured: a whole model has no adapter to swap, and a prompt none"


def measure(
    subject: Subject, fresh: torch.nn.Module, base: torch.nn.Module, rows: TokenRows
) -> tuple[Swapping | None, str]:
    """The figures and how they came about, or None and why there are none.

    Args:
        fresh: the subject as `Subject.load` gave it, with no other adapter beside its own.
        base: for the size of what is there without any adapter.
    """
    if not subject.is_adapter:
        return None, WHOLE
    try:
        pool = load_pool(subject, fresh)
    except (ValueError, NotImplementedError) as error:
        return None, f"not measured: several of these adapters cannot be on one base ({error})"
    swap_ms = median_swap_ms(pool)
    found = Swapping(
        swap_ms=swap_ms,
        ten_adapters_mib=(held_bytes(pool) - held_bytes(base)) / 2**20,
        equal=comes_back(pool, fresh, rows),
    )
    if not found.equal:
        warn(
            f"after {ADAPTERS} adapters took turns on one base, the first one's logits are not "
            "those of a fresh load: serve each of these adapters on a base of its own"
        )
    return found, HOW


def load_pool(subject: Subject, fresh: torch.nn.Module) -> torch.nn.Module:
    """The subject on its base, where it runs, with nine more adapters beside its own.

    Raises:
        ValueError, NotImplementedError: a base cannot have several of them.
    """
    assert subject.model_dir is not None
    # By the last part of the name: the layer that holds such a buffer is not the one that it is
    # saved under.
    buffers = (name.removesuffix(f".{adapters.FIRST}") for name, _ in fresh.named_buffers())
    drawn = {name.split(".")[-1] for name in buffers}
    with tempfile.TemporaryDirectory() as scratch:
        entries = {NAMES[0]: subject.model_dir}
        for number, name in enumerate(NAMES[1:], start=1):
            entries[name] = Path(scratch, name)
            scaled_copy(subject.model_dir, entries[name], 1 + number / 50, drawn)
        base = subject.load_base(quantisation=quantised.read(subject.model_dir))
        return adapters.put_on(base, entries).to(runtime.device())


def scaled_copy(source: Path, target: Path, factor: float, drawn: set[str]) -> None:
    """The files of another adapter, of several methods or one. drawn: what is not learned, which
    stays."""
    for place in adapters.directories(source):
        copy = target / place.relative_to(source)
        copy.mkdir(parents=True)
        shutil.copy(place / adapters.CONFIG, copy)
        weights = load_file(place / adapters.WEIGHTS)
        scaled = {
            key: tensor * factor
            for key, tensor in weights.items()
            if tensor.is_floating_point() and key.split(".")[-1] not in drawn
        }
        save_file(weights | scaled, copy / adapters.WEIGHTS, {"format": "pt"})


def median_swap_ms(pool: torch.nn.Module) -> float:
    """Milliseconds from one active adapter to the next."""
    device, times = runtime.device(), []
    with quiet():
        for name in [*NAMES[1:], NAMES[0]] * ROUNDS:
            wait(device)
            start = time.perf_counter()
            adapters.activate(pool, name)
            wait(device)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@torch.inference_mode()
def comes_back(pool: torch.nn.Module, fresh: torch.nn.Module, rows: TokenRows) -> bool:
    """Whether the first adapter, after all others have had their turn and worked, gives the
    logits of a fresh load. Another one must give others, or nothing was swapped."""
    batch = first_rows(fresh, rows, ROWS)
    expected = run_on(fresh, batch).logits
    for name in NAMES[1:]:
        adapters.activate(pool, name)
    other = run_on(pool, batch).logits
    adapters.activate(pool, NAMES[0])
    back = run_on(pool, batch).logits
    return torch.equal(back, expected) and not torch.equal(other, expected)


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights and buffers."""
    return runtime.tensor_bytes(chain(model.parameters(), model.buffers()))
