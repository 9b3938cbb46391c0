"""LoRA's forward and backward as one function each, in place of PEFT's.

PEFT's path casts the layer's input to float32, keeps that copy for the backward pass, and adds
the update out of place, twice cast. Here the products run in the base's dtype, accumulate into
the base's own output, and the input is kept once, as it came. A and B and their gradients
stay in float32.

    y  = x W^T + b + xa (s B)^T            xa = x A^T, s = alpha / rank
    dx = dy W + dxa A                      dxa = dy (s B)
    dA = dxa^T x          dB = s dy^T xa

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

ADAPTER = "default"


class LoraProduct(torch.autograd.Function):
    """y_TO from x_TI, a frozen W_OI (and bias), and trained A_RI, B_OR; see the module."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        dtype = weight_OI.dtype
        ctx.x_dtype, ctx.scaling = x_TI.dtype, scaling
        x_TI, a_RI, sb_OR = x_TI.to(dtype), a_RI.to(dtype), (b_OR * scaling).to(dtype)
        with torch.autocast(x_TI.device.type, enabled=False):
            xa_TR = x_TI @ a_RI.T
            y_TO = F.linear(x_TI, weight_OI, bias_O).addmm_(xa_TR, sb_OR.T)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, sb_OR, xa_TR)
        return y_TO

    @staticmethod
    def backward(ctx: Any, dy_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TI, weight_OI, a_RI, sb_OR, xa_TR = ctx.saved_tensors
        dxa_TR = dy_TO @ sb_OR
        dx_TI = None
        if ctx.needs_input_grad[0]:
            dx_TI = (dy_TO @ weight_OI).addmm_(dxa_TR, a_RI).to(ctx.x_dtype)
        da_RI = (dxa_TR.T @ x_TI).float()
        db_OR = (dy_TO.T @ xa_TR).float().mul_(ctx.scaling)
        return dx_TI, None, None, da_RI, db_OR, None


def fuse_lora(model: nn.Module) -> int:
    """Give every plain LoRA layer of a PEFT model the fused path. Returns how many.

    Left alone: layers with dropout or a variant (DoRA and the like), and quantised bases.
    """
    layers = [module for module in model.modules() if type(module) is LoraLinear]
    fusible = [layer for layer in layers if _fusible(layer)]
    for layer in fusible:
        layer.forward = partial(_forward, layer)
    return len(fusible)


def _fusible(layer: Any) -> bool:
    return (
        list(layer.lora_A) == [ADAPTER]
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and layer.lora_B[ADAPTER].bias is None
    )


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    base = layer.base_layer
    y_TO = LoraProduct.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2),
        base.weight,
        base.bias,
        layer.lora_A[ADAPTER].weight,
        layer.lora_B[ADAPTER].weight,
        layer.scaling[ADAPTER],
    )
    return y_TO.unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]
