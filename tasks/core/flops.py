"""FLOPs of what runs, from the operations themselves: two for each multiply-add, products only.

torch's own formulas, of products in place too, which torch's counter leaves out and fused LoRA
has, and of bitsandbytes' product of 4-bit weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """flops: of all that has run under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, out)
        return out


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Of one operation; 0 of what is no product."""
    formula = _formula(func)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


@cache
def _formula(func: Any) -> Any:
    """torch's own formula; what is done in place costs what it costs out of place."""
    if is_four_bits(func):
        return _four_bit_flops
    packet = func.overloadpacket
    if packet in flop_registry:
        return flop_registry[packet]
    name = packet.__name__
    if name.endswith("_") and not name.endswith("__") and hasattr(aten, name[:-1]):
        return flop_registry.get(getattr(aten, name[:-1]))
    return None


def is_four_bits(func: Any) -> bool:
    """Whether it is bitsandbytes' product of x_TI and packed weights of shape [O, I]."""
    name: str = func.name()
    return name == "bitsandbytes::gemm_4bit"


def _four_bit_flops(x: torch.Tensor, packed: Any, shape: Any, *rest: Any, **named: Any) -> int:
    return 2 * x.numel() * int(shape[0])
