"""What `dtype: auto` means on this machine, and how fast it multiplies, FLOP/s.

    echo float32 | python -m tasks.cost.calibrate

The first line tells the one. Products are timed when standard input has ended with a dtype, so that
a process can have imported torch before the machine is quiet: of a layer's shape, 1,024 tokens, at
three widths; medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from tasks.core.runtime import TORCH_DTYPES, device, resolve_dtype
from tasks.cost import lean

TOKENS = 1024
WIDTHS = (256, 512, 1024)
#: Of which the first is not counted: it wakes the threads and chooses a kernel.
REPEATS = 4


def middle_rate(dtype: torch.dtype) -> float:
    """The middle width's rate."""
    return statistics.median(rate(width, dtype) for width in WIDTHS)


def rate(width: int, dtype: torch.dtype) -> float:
    """FLOP/s of [TOKENS, width] by [width, 4 width]."""
    place = device()
    x = torch.ones(TOKENS, width, dtype=dtype, device=place)
    w = torch.ones(width, 4 * width, dtype=dtype, device=place)
    times = []
    for turn in range(REPEATS):
        start = time.perf_counter()
        y = x @ w
        if place.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 1:
            times.append(time.perf_counter() - start)
    assert y.shape == (TOKENS, 4 * width)
    return 2.0 * TOKENS * width * 4 * width / statistics.median(times)


if __name__ == "__main__":
    print(resolve_dtype("auto"), flush=True)
    print(middle_rate(TORCH_DTYPES[sys.stdin.read().strip()]))
    lean.end()
