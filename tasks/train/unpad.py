"""Encoders that work on real tokens only.

A batch of texts is mostly padding: in banking77 the longest of 36 rows has four times the tokens
of the mean. Every layer of an encoder but attention works token by token, so the padding is taken
out before the first layer and put back after the last: in between, rows stand end to end and
attention keeps them apart (`tasks/train/attention.py`). Embeddings, pooler and head see the batch
as they always do.

Shapes: B rows, L the longest, H hidden, T real tokens, filled up to a multiple of `TOKEN_ALIGN`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tasks.train.batching import TOKEN_ALIGN

#: What the backbones of known encoders call their stack of layers.
STACKS = ("encoder", "transformer")


def unpad(backbone: nn.Module) -> bool:
    """Let the layers of an encoder work without padding. Whether its stack is of a known kind:
    one that hands what it does not know down to its attention.

    backbone: one whose attention is `tasks.train.attention`.
    """
    for name in STACKS:
        stack = getattr(backbone, name, None)
        if stack is not None and _hands_down(stack.forward):
            stack.forward = partial(_forward, stack.forward)
            return True
    return False


def _hands_down(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters
    return "attention_mask" in parameters and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _forward(
    own: Callable[..., Any],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The stack's forward. attention_mask: [B, 1, L, L], true where a query looks; None: no
    padding, nothing to take out."""
    if attention_mask is None or attention_mask.dtype != torch.bool:
        return own(hidden_states, attention_mask=attention_mask, **kwargs)
    real_BL = attention_mask[:, 0, 0]
    place_T = real_BL.flatten().nonzero()[:, 0]
    lengths_B = real_BL.sum(1)
    fill = -len(place_T) % TOKEN_ALIGN
    ends = F.pad(lengths_B.cumsum(0), (1, 0))
    if fill:
        # A row of its own, of whose output nothing is read.
        ends = F.pad(ends, (0, 1), value=len(place_T) + fill)
    packed_TH = hidden_states.flatten(0, 1).index_select(0, F.pad(place_T, (0, fill)))
    output = own(packed_TH[None], attention_mask=None, cu_seq_lens_q=ends.int(), **kwargs)
    out_TH = output.last_hidden_state[0, : len(place_T)]
    padded_NH = out_TH.new_zeros(real_BL.numel(), out_TH.shape[1]).index_copy(0, place_T, out_TH)
    output.last_hidden_state = padded_NH.view(*real_BL.shape, -1)
    return output
