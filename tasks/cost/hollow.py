"""Tensors without numbers that say they are on a CPU.

What `torch._subclasses.FakeTensor` is, without the symbolic shapes, the cache and the compiler that
it imports: a plan asks for whole sizes alone, and its first answer was a second later for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

CPU, META = torch.device("cpu"), torch.device("meta")


class Hollow(torch.Tensor):
    """shapes: the same tensor on meta, with which it shares its storage, and so who is a view of
    whom."""

    shapes: torch.Tensor

    @staticmethod
    def __new__(cls, shapes: torch.Tensor) -> Hollow:
        # Its kernels are chosen as on a CPU: by autocast, by attention.
        made: Hollow = torch.Tensor._make_subclass(
            cls, shapes, shapes.requires_grad, dispatch_device=True, device_for_backend_keys=CPU
        )
        made.shapes = shapes
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CPU

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Hollow({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The operation on meta. Real tensors beside hollow ones are taken for hollow."""
        if func is torch.ops.prim.device.default:
            return CPU
        given: dict[int, Hollow] = {}

        def on_meta(value: torch.Tensor | torch.device) -> Any:
            if isinstance(value, torch.device):
                return META
            if isinstance(value, Hollow):
                given[id(value.shapes)] = value
                return value.shapes
            return value.to(META)

        def hollow(value: torch.Tensor) -> Hollow:
            # What is changed in place stays who it was.
            known = given.get(id(value))
            return Hollow(value) if known is None else known

        there = torch.Tensor, torch.device
        args, kwargs = tree_map_only(there, on_meta, (args, kwargs or {}))
        out = func(*args, **kwargs)
        if func is torch.ops.aten.native_layer_norm.default:
            # On meta torch answers for a GPU. On a CPU moments have the dtype of what they are of.
            result, *moments = out
            out = result, *(part.to(result.dtype) for part in moments)
        return tree_map_only(torch.Tensor, hollow, out)
