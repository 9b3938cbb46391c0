"""LoRA's forward and backward as one function each, in place of PEFT's; DoRA's and AdaLoRA's too.

PEFT's path casts the layer's input to float32, keeps that copy for the backward pass, and adds
the update out of place, twice cast. Here the products run in the base's dtype, accumulate into
the base's own output, and the input is kept once, as it came. A and B and their gradients
stay in float32. Layers that read the same input (q, k, v; gate, up) are one function: A of all
of them is one product, and the gradients of the input add up in place.

    y  = x W^T + b + xa (s B)^T            xa = x A^T, s = alpha / rank
    dx = dy W + dxa A                      dxa = dy (s B)
    dA = dxa^T x          dB = s dy^T xa

DoRA (Liu et al. 2024, arXiv:2402.09353) scales each output by g = m / ||W + s B A||, a number for
each row, of which m learns and the length is taken for a constant (its section 4.3). That is LoRA
with g W and g B in place of W and B, and the gradient of m needs no more than what came out:

    dm = sum over tokens of dy (y - b) / m

So y is kept, which what follows mostly keeps anyway (attention, activations). g W is made for each
product and not kept, and the lengths take blocks of rows (`tasks/methods/row_lengths.py`).

AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) is LoRA with diag(E) A in place of A. (PEFT divides
each layer's update, [T, O], by a tensor of one float32 number, which makes float32 of all of it.)

Shapes: T tokens, I inputs, O outputs, R rank, S ranks of all layers that share an input.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from tasks.methods.row_lengths import row_lengths, scaled_rows, sum_of_products

ADAPTER = "default"
#: What PEFT adds to the rank that AdaLoRA's alpha is divided by.
EPSILON = 1e-5
#: Things that `LoraProducts` is given of a layer, and that it keeps of it.
GIVEN, KEPT = 6, 7


class LoraProducts(torch.autograd.Function):
    """y_TO of each layer from x_TI and, layer by layer, a frozen W_OI, its bias or None, the
    scaling, trained A_RI and B_OR, and DoRA's m_O or None; see the module."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, *layers: Any) -> tuple[torch.Tensor, ...]:
        parts = [layers[i : i + GIVEN] for i in range(0, len(layers), GIVEN)]
        dtype, a_RIs = parts[0][0].dtype, [part[3] for part in parts]
        ctx.x_dtype, ctx.ranks = x_TI.dtype, [len(a_RI) for a_RI in a_RIs]
        ctx.scalings = [part[2] for part in parts]
        x_TI, a_SI = x_TI.to(dtype), _joined([a_RI.to(dtype) for a_RI in a_RIs], 0)
        y_TOs: list[torch.Tensor] = []
        kept: list[torch.Tensor | None] = []
        with torch.autocast(x_TI.device.type, enabled=False):
            # Contiguous: a product copies what is not.
            xa_TRs = [part.contiguous() for part in torch.split(x_TI @ a_SI.T, ctx.ranks, 1)]
            for xa_TR, (weight_OI, bias_O, scaling, a_RI, b_OR, m_O) in zip(
                xa_TRs, parts, strict=True
            ):
                g_O = None if m_O is None else m_O / row_lengths(weight_OI, a_RI, b_OR, scaling)
                gsb_OR = (b_OR * _factor(scaling, g_O)).to(dtype)
                y_TO = F.linear(x_TI, _scaled(weight_OI, g_O), bias_O).addmm_(xa_TR, gsb_OR.T)
                y_TOs.append(y_TO)
                of_m = (None, None, None) if m_O is None else (m_O, bias_O, y_TO)
                kept += [weight_OI, gsb_OR, xa_TR, g_O, *of_m]
        ctx.save_for_backward(x_TI, a_SI, *kept)
        return tuple(y_TOs)

    @staticmethod
    def backward(ctx: Any, *dy_TOs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_TI, a_SI, *saved = ctx.saved_tensors
        kept = [saved[i : i + KEPT] for i in range(0, len(saved), KEPT)]
        dxa_TS = _joined([dy_TO @ part[1] for dy_TO, part in zip(dy_TOs, kept, strict=True)], 1)
        dx_TI = None
        if ctx.needs_input_grad[0]:
            for dy_TO, (weight_OI, _, _, g_O, *_) in zip(dy_TOs, kept, strict=True):
                gw_OI = _scaled(weight_OI, g_O)
                dx_TI = dy_TO @ gw_OI if dx_TI is None else dx_TI.addmm_(dy_TO, gw_OI)
            assert dx_TI is not None
            dx_TI = dx_TI.addmm_(dxa_TS, a_SI).to(ctx.x_dtype)
        da_RIs = torch.split((dxa_TS.T @ x_TI).float(), ctx.ranks)
        grads: list[torch.Tensor | None] = [dx_TI]
        for dy_TO, scaling, da_RI, (_, _, xa_TR, g_O, m_O, bias_O, y_TO) in zip(
            dy_TOs, ctx.scalings, da_RIs, kept, strict=True
        ):
            # As [R, O] and turned: the product is a quarter faster that way.
            db_OR = (xa_TR.T @ dy_TO).T.contiguous().float().mul_(_factor(scaling, g_O))
            dm_O = None if m_O is None else sum_of_products(dy_TO, y_TO, bias_O) / m_O
            grads += [None, None, None, da_RI, db_OR, dm_O]
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
    """Give every LoRA, DoRA and AdaLoRA layer of a PEFT model the fused path. Returns how many.

    Left alone: layers with dropout or another variant, quantised bases, and layers whose own
    weights learn.
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
        type(layer) in (LoraLinear, SVDLinear)
        and list(layer.lora_A) == [ADAPTER]
        and type(layer.base_layer) is nn.Linear
        and not any(weight.requires_grad for weight in layer.base_layer.parameters())
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and (type(layer) is SVDLinear or _is_plain(layer))
    )


def _is_plain(layer: Any) -> bool:
    """Whether a LoRA layer is no variant but DoRA, and has no bias of its own."""
    variants = layer.lora_variant.values()
    known = all(type(variant) is DoraLinearVariant for variant in variants)
    return known and layer.lora_B[ADAPTER].bias is None


def _outputs(layers: list[Any], x: torch.Tensor) -> list[torch.Tensor]:
    parts: list[Any] = []
    for layer in layers:
        base = layer.base_layer
        learned = _of_adalora(layer) if type(layer) is SVDLinear else _of_lora(layer)
        parts += [base.weight, base.bias, *learned]
    y_TOs = LoraProducts.apply(x.flatten(0, -2), *parts)  # type: ignore[no-untyped-call]
    return [y_TO.unflatten(0, x.shape[:-1]) for y_TO in y_TOs]


def _of_lora(layer: Any) -> tuple[Any, ...]:
    """The scaling, A_RI, B_OR, and DoRA's m_O or None."""
    a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    m_O = layer.lora_magnitude_vector[ADAPTER].weight if layer.lora_variant else None
    return layer.scaling[ADAPTER], a_RI, b_OR, m_O


def _of_adalora(layer: Any) -> tuple[Any, ...]:
    """As `_of_lora`; the rank that alpha is divided by is a tensor, so it goes into A as well."""
    share_1 = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER] + EPSILON)
    a_RI = layer.lora_A[ADAPTER] * (layer.lora_E[ADAPTER] * share_1)
    return 1.0, a_RI, layer.lora_B[ADAPTER], None


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _scaled(weight_OI: torch.Tensor, g_O: torch.Tensor | None) -> torch.Tensor:
    return weight_OI if g_O is None else scaled_rows(weight_OI, g_O)


def _factor(scaling: float, g_O: torch.Tensor | None) -> float | torch.Tensor:
    """What B_OR is multiplied with."""
    return scaling if g_O is None else (scaling * g_O).unsqueeze(1)
