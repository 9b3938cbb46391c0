"""LoRA's forward and backward as one function each, in place of PEFT's.

PEFT's path casts the layer's input to float32, keeps that copy for the backward pass, and adds
the update out of place, twice cast. Here the products run in the base's dtype, accumulate into
the base's own output, and the input is kept once, as it came. A and B and their gradients
stay in float32. Layers that read the same input (q, k, v; gate, up) are one function: A of all
of them is one product, and the gradients of the input add up in place.

    y  = x W^T + b + xa (s B)^T            xa = x A^T, s = alpha / rank
    dx = dy W + dxa A                      dxa = dy (s B)
    dA = dxa^T x          dB = s dy^T xa

Shapes: T tokens, I inputs, O outputs, R rank, S ranks of all layers that share an input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

ADAPTER = "default"


class LoraProducts(torch.autograd.Function):
    """y_TO of each layer from x_TI and, layer by layer, a frozen W_OI (and bias), the scaling,
    and trained A_RI, B_OR; see the module."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, *layers: Any) -> tuple[torch.Tensor, ...]:
        weights, biases, scalings, a_RIs, b_ORs = (layers[i::5] for i in range(5))
        dtype = weights[0].dtype
        ctx.x_dtype, ctx.scalings, ctx.ranks = x_TI.dtype, scalings, [len(a) for a in a_RIs]
        x_TI, a_SI = x_TI.to(dtype), _joined([a.to(dtype) for a in a_RIs], 0)
        sb_ORs = [(b * scaling).to(dtype) for b, scaling in zip(b_ORs, scalings, strict=True)]
        with torch.autocast(x_TI.device.type, enabled=False):
            # Contiguous: a product copies what is not.
            xa_TRs = [part.contiguous() for part in torch.split(x_TI @ a_SI.T, ctx.ranks, 1)]
            y_TOs = tuple(
                F.linear(x_TI, weight_OI, bias_O).addmm_(xa_TR, sb_OR.T)
                for weight_OI, bias_O, xa_TR, sb_OR in zip(
                    weights, biases, xa_TRs, sb_ORs, strict=True
                )
            )
        ctx.save_for_backward(x_TI, a_SI, *weights, *sb_ORs, *xa_TRs)
        return y_TOs

    @staticmethod
    def backward(ctx: Any, *dy_TOs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TI, a_SI, *saved = ctx.saved_tensors
        count = len(dy_TOs)
        weights, sb_ORs, xa_TRs = saved[:count], saved[count : 2 * count], saved[2 * count :]
        dxa_TS = _joined([dy @ sb_OR for dy, sb_OR in zip(dy_TOs, sb_ORs, strict=True)], 1)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TOs[0] @ weights[0]
            for dy_TO, weight_OI in zip(dy_TOs[1:], weights[1:], strict=True):
                dx_TI.addmm_(dy_TO, weight_OI)
            dx_TI = dx_TI.addmm_(dxa_TS, a_SI).to(ctx.x_dtype)
        da_RIs = torch.split((dxa_TS.T @ x_TI).float(), ctx.ranks)
        grads: list[torch.Tensor | None] = [dx_TI]
        for dy_TO, xa_TR, scaling, da_RI in zip(dy_TOs, xa_TRs, ctx.scalings, da_RIs, strict=True):
            # As [R, O] and turned: the product is a quarter faster that way.
            db_OR = (xa_TR.T @ dy_TO).T.contiguous().float().mul_(scaling)
            grads += [None, None, None, da_RI, db_OR]
        return tuple(grads)


class Siblings:
    """LoRA layers of one module. Those that are called with the same tensor as the first one
    are computed together with it, from the pass on that follows the one which showed it.

    Only a pass without gradients can show it: gradient checkpointing runs the others twice, and
    the second time has to save what the first did.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.together = layers[:1]
        self.ready: dict[Any, torch.Tensor] = {}
        self.last: Callable[[], torch.Tensor | None] = lambda: None
        for layer in layers:
            layer.forward = partial(self.forward, layer)

    def forward(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """A layer's output. The first of them makes those of all that share its input."""
        if layer is self.together[0]:
            outputs = _outputs(self.together, x)
            self.last = weakref.ref(x)
            self.ready = dict(zip(self.together[1:], outputs[1:], strict=True))
            return outputs[0]
        if self.last() is not x:
            return _outputs([layer], x)[0]
        if layer in self.ready:
            return self.ready.pop(layer)
        if layer not in self.together and not torch.is_grad_enabled():
            self.together.append(layer)
        return _outputs([layer], x)[0]


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the fused path. Returns how many.

    Left alone: layers with dropout or a variant (DoRA and the like), quantised bases, and layers
    whose own weights learn.
    """
    fused = 0
    for parent in model.modules():
        layers = [child for child in parent.children() if _fusible(child)]
        fused += len(layers)
        if layers:
            Siblings(layers)
    return fused


def _fusible(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and list(layer.lora_A) == [ADAPTER]
        and type(layer.base_layer) is nn.Linear
        and not any(weight.requires_grad for weight in layer.base_layer.parameters())
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and layer.lora_B[ADAPTER].bias is None
    )


def _outputs(layers: list[Any], x: torch.Tensor) -> list[torch.Tensor]:
    parts: list[Any] = []
    for layer in layers:
        base = layer.base_layer
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        parts += [base.weight, base.bias, layer.scaling[ADAPTER], a, b]
    y_TOs = LoraProducts.apply(x.flatten(0, -2), *parts)  # type: ignore[no-untyped-call]
    return [y_TO.unflatten(0, x.shape[:-1]) for y_TO in y_TOs]


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
