"""A ledger of one pass: bytes that live, their peak, FLOPs, and which products were compiled, from
the operations themselves.

Weights are hollow (`tasks/cost/hollow.py`), so nothing is computed with them, while index tensors
are real and small, so that all that depends on the rows comes out as it would. What training would
ask a number that is not there (is any probability too small?) is answered with no.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tasks.core.flops import flops_of, is_four_bits
from tasks.core.quantised import BLOCK
from tasks.cost.hollow import Hollow, Room, answer

aten = torch.ops.aten
#: An operation, and of its tensors the shapes and strides.
Product = tuple[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """live: bytes of all tensors made under it that still exist. history: after each operation.

    products: the different ones in bfloat16, as oneDNN tells them apart: by the operation, shapes
    and strides. It compiles each once and keeps it (`tasks/train/heap.py`).
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        """known: what is counted elsewhere, weights and buffers."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.flops = 0.0
        self.history: list[int] = []
        self.products: set[Product] = set()
        self._seen: dict[int, Any] = {}
        for tensor in known:
            storage = _storage(tensor)
            self._seen[id(storage)] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and isinstance(args[0], Hollow):
            return False if args[0].dtype == torch.bool else 0
        before = self.live
        kwargs = kwargs or {}
        out = answer(func, args, kwargs) if Hollow in types else func(*args, **kwargs)
        if func is aten.native_batch_norm_backward.default:
            # Without numbers torch makes all three gradients, and the kernel those asked for.
            out = tuple(part if asked else None for part, asked in zip(out, args[-1], strict=True))
        flops = flops_of(func, args, kwargs, out)
        self.flops += flops
        if flops:
            self.products |= _compiled(func, args)
        for value in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._enter(value)
        # Both at once, as what is made on the way goes when the result is there.
        self.history.append(max(before, self.live) + _on_the_way(func, args))
        return out

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes if isinstance(storage, Room) else storage.nbytes()
        self.live += size

        def leave(_: Any) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, leave)


def _compiled(func: Any, args: Any) -> set[Product]:
    """The product, if oneDNN computes it: float32 ones are MKL's, which compiles none."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    if tensors[0].dtype != torch.bfloat16:
        return set()
    return {(func.name(), tuple((tuple(x.shape), x.stride()) for x in tensors))}


def _storage(tensor: torch.Tensor) -> Any:
    return tensor.room if isinstance(tensor, Hollow) else tensor.untyped_storage()


def _on_the_way(func: Any, args: Any) -> int:
    """Bytes that an operation holds inside: of packed weights all of them as they are computed
    with, and their scales in float32."""
    if not is_four_bits(func):
        return 0
    x: torch.Tensor = args[0]
    shape: list[int] = list(args[2])
    weights: int = math.prod(shape)
    return weights * x.element_size() + 4 * (weights // BLOCK)
