"""A base on shapes alone as bitsandbytes would hold it: packed weights and their scales.

The layers are bitsandbytes' own, so that PEFT adapts them and a pass goes through them as it does
in training. Two weights are a byte. Each block of 64 has a scale: a float32, or a byte with double
quantisation, where each 256 of those have a float32.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tasks.core.models import unquantised_modules
from tasks.core.quantised import BLOCK, Quantisation, require_bitsandbytes

#: Scales that share a scale, with double quantisation.
OUTER_BLOCK = 256
#: Levels of 4 bits, and of the 8 bits of a scale.
LEVELS, OUTER_LEVELS = 16, 256
META = torch.device("meta")
#: Makes a hollow tensor of one on meta.
MakeHollow = Callable[[torch.Tensor], torch.Tensor]


def quantise(model: Any, quantisation: Quantisation, place: str) -> None:
    """Every linear layer of a base on meta but its heads becomes one of 4 bits, in place.

    Raises:
        UserError: bitsandbytes is not there.
    """
    require_bitsandbytes(place)
    heads = tuple(f"{head}." for head in unquantised_modules(model))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and not f"{name}.".startswith(heads)
    }
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, four_bits(layer, quantisation))
    # By this PEFT knows which of its layers to use.
    model.is_loaded_in_4bit = True


def four_bits(layer: nn.Linear, quantisation: Quantisation) -> nn.Module:
    """A layer of the same shape whose weights are packed."""
    kinds: Any = importlib.import_module("bitsandbytes.nn")
    double, kind = quantisation.double_quantisation, quantisation.quant_type
    packed: nn.Module = kinds.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=double,
        quant_type=kind,
        device=META,
    )
    packed.bias = layer.bias
    packed.weight = kinds.Params4bit(
        torch.empty((layer.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=META),
        quant_state=state_of(layer.weight, quantisation),
        compress_statistics=double,
        quant_type=kind,
        module=packed,
        bnb_quantized=True,
    )
    # As `quantised.settle` leaves it.
    packed.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return packed


def state_of(weight: torch.Tensor, quantisation: Quantisation) -> Any:
    """The scales of a weight."""
    kinds: Any = importlib.import_module("bitsandbytes.functional")
    blocks = -(-weight.numel() // BLOCK)
    outer, offset = None, None
    if quantisation.double_quantisation:
        outer = kinds.QuantState(
            absmax=torch.empty(-(-blocks // OUTER_BLOCK), device=META),
            code=torch.empty(OUTER_LEVELS, device=META),
            blocksize=OUTER_BLOCK,
            dtype=torch.float32,
        )
        offset = torch.empty((), device=META)
    scale = torch.float32 if outer is None else torch.uint8
    return kinds.QuantState(
        absmax=torch.empty(blocks, dtype=scale, device=META),
        shape=weight.shape,
        code=torch.empty(LEVELS, device=META),
        blocksize=BLOCK,
        quant_type=quantisation.quant_type,
        dtype=weight.dtype,
        offset=offset,
        state2=outer,
    )


def scales(weight: torch.Tensor) -> list[torch.Tensor]:
    """The tensors beside a packed weight; none beside any other."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return []
    found = [state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def with_scales(hollow: Any, weight: torch.Tensor, hollow_of: MakeHollow) -> Any:
    """The hollow of a packed weight, with those of its scales; of any other as it is."""
    state: Any = copy.copy(getattr(weight, "quant_state", None))
    if state is None:
        return hollow
    state.absmax, state.code = hollow_of(state.absmax), hollow_of(state.code)
    if state.nested:
        state.offset, state.state2 = hollow_of(state.offset), copy.copy(state.state2)
        state.state2.absmax = hollow_of(state.state2.absmax)
        state.state2.code = hollow_of(state.state2.code)
    hollow.quant_state = state
    return hollow
