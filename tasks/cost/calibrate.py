"""How fast this machine multiplies: `python -m tasks.cost.calibrate`, one JSON line, under 1 s.

Products of a layer's shape, 1,024 tokens, at three widths, in both dtypes; medians. FLOP/s.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from tasks.core.runtime import TORCH_DTYPES, device

TOKENS = 1024
WIDTHS = (256, 512, 1024)
REPEATS = 5


def rates() -> dict[str, float]:
    """The middle width's rate for each dtype."""
    return {
        name: statistics.median(rate(width, dtype) for width in WIDTHS)
        for name, dtype in TORCH_DTYPES.items()
    }


def rate(width: int, dtype: torch.dtype) -> float:
    """FLOP/s of [TOKENS, width] by [width, 4 width]. Two warm-ups."""
    place = device()
    x = torch.ones(TOKENS, width, dtype=dtype, device=place)
    w = torch.ones(width, 4 * width, dtype=dtype, device=place)
    times = []
    for turn in range(REPEATS + 2):
        start = time.perf_counter()
        y = x @ w
        if place.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 2:
            times.append(time.perf_counter() - start)
    assert y.shape == (TOKENS, 4 * width)
    return 2.0 * TOKENS * width * 4 * width / statistics.median(times)


if __name__ == "__main__":
    print(json.dumps(rates()))
