"""Several adapters on one loaded base: what a swap costs, what ten weigh, and what comes back.

One base serves many tasks only if going from one adapter to another is cheap and leaves nothing
behind. So the subject's adapter is loaded with nine others, which are files of their own like
those of other tasks: its weights, each set scaled by another factor.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from schemas.report import Swapping
from tasks.core import runtime
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
#: What PEFT calls the adapter that is loaded with the model.
FIRST = "default"

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
    pool: Any = subject.load().to(runtime.device())
    try:
        names = [FIRST, *load_others(pool, subject)]
    except (ValueError, NotImplementedError) as error:
        return None, f"not measured: several of these adapters cannot be on one base ({error})"
    swap_ms = median_swap_ms(pool, names)
    found = Swapping(
        swap_ms=swap_ms,
        ten_adapters_mib=(held_bytes(pool) - held_bytes(base)) / 2**20,
        equal=comes_back(pool, names, fresh, rows),
    )
    if not found.equal:
        warn(
            f"after {ADAPTERS} adapters took turns on one base, the first one's logits are not "
            "those of a fresh load: serve each of these adapters on a base of its own"
        )
    return found, HOW


def load_others(pool: Any, subject: Subject) -> list[str]:
    """Put nine more adapters beside the first, and return their names."""
    assert subject.model_dir is not None
    weights = load_file(subject.model_dir / "adapter_model.safetensors")
    names = [f"other{number}" for number in range(1, ADAPTERS)]
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(subject.model_dir / "adapter_config.json", directory)
        for number, name in enumerate(names, start=1):
            scaled = {key: scaled_by(1 + number / 50, tensor) for key, tensor in weights.items()}
            save_file(scaled, Path(directory, "adapter_model.safetensors"), {"format": "pt"})
            pool.load_adapter(directory, name, torch_device=str(runtime.device()))
    return names


def scaled_by(factor: float, tensor: torch.Tensor) -> torch.Tensor:
    """Another adapter's weights; what is counted, and not learned, stays."""
    return tensor * factor if tensor.is_floating_point() else tensor


def median_swap_ms(pool: Any, names: list[str]) -> float:
    """Milliseconds from one active adapter to the next."""
    device, times = runtime.device(), []
    with quiet():
        for name in [*names[1:], names[0]] * ROUNDS:
            wait(device)
            start = time.perf_counter()
            swap(pool, name)
            wait(device)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def swap(pool: Any, name: str) -> None:
    """Make an adapter the active one, frozen, as it is served."""
    pool.set_adapter(name, inference_mode=True)


@torch.inference_mode()
def comes_back(pool: Any, names: list[str], fresh: torch.nn.Module, rows: TokenRows) -> bool:
    """Whether the first adapter, after all others have had their turn and worked, gives the
    logits of a fresh load. Another one must give others, or nothing was swapped."""
    batch = first_rows(fresh, rows, ROWS)
    expected = run_on(fresh, batch).logits
    for name in names[1:]:
        swap(pool, name)
    other = run_on(pool, batch).logits
    swap(pool, names[0])
    back = run_on(pool, batch).logits
    return torch.equal(back, expected) and not torch.equal(other, expected)


def held_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's weights and buffers."""
    return runtime.tensor_bytes(chain(model.parameters(), model.buffers()))
