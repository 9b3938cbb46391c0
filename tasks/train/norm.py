"""RMSNorm with a frozen weight, in fewer passes over memory than as it is usually written.

    y = x r w,  r = 1 / sqrt(mean(x^2) + eps)        dx = r g - x r^3 mean(g x),  g = w dy

transformers' RMSNorm casts to float32, squares, averages and multiplies in six kernels and
keeps float32 copies for the backward pass. Here x r is one kernel: a batch norm whose channels
are the tokens, with a mean of zero and the variance mean(x^2). Only x and r are kept.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn


class RmsNorm(torch.autograd.Function):
    """y_TH from x_TH and a frozen weight_H; r and the sums in float32."""

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        tokens, width = x_TH.shape
        norm_T = torch.linalg.vector_norm(x_TH, dim=-1, dtype=torch.float32)
        square_T = norm_T.square_().div_(width)
        y_1TH, _, _ = torch.native_batch_norm(
            x_TH[None], None, None, torch.zeros(tokens), square_T, False, 0.0, eps
        )
        ctx.save_for_backward(x_TH, weight_H, (square_T + eps).rsqrt_()[:, None])
        return y_1TH[0] * weight_H

    @staticmethod
    def backward(ctx: Any, dy_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TH, weight_H, r_T1 = ctx.saved_tensors
        g_TH = dy_TH * weight_H
        sum_T1 = (g_TH * x_TH).sum(-1, keepdim=True, dtype=torch.float32)
        back_T1 = (sum_T1 * r_T1.pow(3)).div_(-x_TH.shape[1]).to(x_TH.dtype)
        return g_TH.mul_(r_T1.to(x_TH.dtype)).addcmul_(x_TH, back_T1), None, None


def fuse_norms(model: nn.Module) -> int:
    """Give every frozen RMSNorm of Llama's kind the path above. Returns how many.

    Others (Gemma's 1 + w, a trained weight) are left alone: a layer is of Llama's kind if it has
    Llama's attributes and gives the same numbers.
    """
    fused = 0
    for module in model.modules():
        if _fusible(module):
            module.forward = partial(_forward, module)
            fused += 1
    return fused


@torch.no_grad()
def _fusible(module: Any) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    weight = module.weight
    if weight.requires_grad or weight.device.type not in ("cpu", "meta"):
        return False
    if weight.device.type == "meta":
        # Shapes alone, of a dry run (`tasks/cost`): what its like does with numbers.
        module = copy.deepcopy(module).to_empty(device="cpu")
        weight = module.weight.fill_(1.0)
    x = torch.linspace(-3, 2, 3 * len(weight), dtype=weight.dtype).view(3, -1)
    # One rounding of the result's dtype apart at most.
    return torch.allclose(_forward(module, x), module(x), rtol=2 * torch.finfo(x.dtype).eps)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    y_TH = RmsNorm.apply(x.flatten(0, -2), module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return y_TH.view_as(x)  # type: ignore[no-any-return]
