"""Attention for training on a CPU: causal over packed rows, or with a padding mask.

PyTorch's fused CPU attention is fast forward and slow backward in bfloat16: for 768 heads of
16 tokens its backward takes 50 ms on one core where the products themselves take 1 ms
(docs/train.md). Here both directions are batched products, which run on the matrix units:

    P  = softmax(s Q K^T + bias)        O  = P V
    dV = P^T dO                         dP = dO V^T
    dS = P * (dP - rowsum(dP * P))      dQ = s dS K,  dK = s dS^T Q

P is kept, L * L for each head, so rows longer than `LONGEST` go to PyTorch's kernel. Packed
rows are cut apart before the products: there is nothing through which one could see another.
Each is padded to a multiple of `ALIGN`, because oneDNN compiles and keeps about 1 MB of code for
every new shape of a product.

Shapes: B batch, H heads, N = B * H, L tokens, D head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "peftflow_cpu"
ALIGN = 32
LONGEST = 1024


class Attention(torch.autograd.Function):
    """O_NLD from q_NLD, k_NLD, v_NLD and an additive bias, [1 or N, L or 1, L], or None."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NLD: torch.Tensor,
        k_NLD: torch.Tensor,
        v_NLD: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        if bias is None:
            p_NLL = (q_NLD * scale) @ k_NLD.transpose(1, 2)
        else:
            shape = (len(q_NLD), q_NLD.shape[1], k_NLD.shape[1])
            p_NLL = torch.baddbmm(bias.expand(shape), q_NLD, k_NLD.transpose(1, 2), alpha=scale)
        p_NLL = torch.softmax(p_NLL, -1)
        ctx.scale = scale
        ctx.save_for_backward(q_NLD, k_NLD, v_NLD, p_NLL)
        return p_NLL @ v_NLD

    @staticmethod
    def backward(ctx: Any, do_NLD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_NLD, k_NLD, v_NLD, p_NLL = ctx.saved_tensors
        dv_NLD = p_NLL.transpose(1, 2) @ do_NLD
        ds_NLL = torch._softmax_backward_data(
            do_NLD @ v_NLD.transpose(1, 2), p_NLL, -1, p_NLL.dtype
        )
        dq_NLD = (ds_NLL @ k_NLD).mul_(ctx.scale)
        dk_NLD = (ds_NLL.transpose(1, 2) @ q_NLD).mul_(ctx.scale)
        return dq_NLD, dk_NLD, dv_NLD, None, None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q, k, v [B, H, L, D] to [B, L, H, D].

    cu_seq_lens_q: where packed rows start and end, [rows + 1], in a batch of one.
    """
    # Under autocast rotary embeddings leave q and k in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is not None:
        assert attention_mask is None, "packed rows have no mask"
        # split, not slices: a slice's gradient is a whole tensor of zeros with the slice in it.
        lengths = cu_seq_lens_q.diff().tolist()
        parts = (torch.split(x[0], lengths, dim=1) for x in (query, key, value))
        rows = [_causal(q, k, v, scale) for q, k, v in zip(*parts, strict=True)]
        return torch.cat(rows, dim=1).transpose(0, 1)[None], None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.shape[2] > LONGEST or dropout > 0.0:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling, causal, **kwargs
        )
    batch, heads, length, _ = query.shape
    bias = None
    if attention_mask is not None:
        bias = _additive(attention_mask, query.dtype)
        bias = bias.expand(batch, heads, -1, -1).flatten(0, 1)
    elif causal:
        bias = _causal_bias(length, query.dtype)
    out_NLD = _product(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias, scale)
    return out_NLD.view(batch, heads, length, -1).transpose(1, 2), None


def mask(
    batch_size: int, q_length: int, *args: Any, attention_mask: Any = None, **kwargs: Any
) -> torch.Tensor | None:
    """transformers' mask interface. With no padding, `attend` knows causality by itself."""
    if attention_mask is None:
        return None
    return sdpa_mask(batch_size, q_length, *args, attention_mask=attention_mask, **kwargs)  # type: ignore[no-any-return]


def register() -> None:
    """Make the two known to transformers under `NAME`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def _causal(
    q_HLD: torch.Tensor, k_HLD: torch.Tensor, v_HLD: torch.Tensor, scale: float
) -> torch.Tensor:
    """One row's causal attention, [H, L, D]."""
    length = q_HLD.shape[1]
    if length > LONGEST:
        return F.scaled_dot_product_attention(q_HLD, k_HLD, v_HLD, is_causal=True, scale=scale)
    padded = -(-length // ALIGN) * ALIGN
    # Padding is on the right, where causal attention does not look.
    q_HLD, k_HLD, v_HLD = (F.pad(x, (0, 0, 0, padded - length)) for x in (q_HLD, k_HLD, v_HLD))
    bias = _causal_bias(padded, q_HLD.dtype)
    return _product(q_HLD, k_HLD, v_HLD, bias, scale)[:, :length]


def _product(
    q_NLD: torch.Tensor,
    k_NLD: torch.Tensor,
    v_NLD: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The products in one dtype, autocast's if it is on: rotary embeddings leave q and k in
    float32 where v is bfloat16, and a backward pass has no autocast to make them one."""
    kind = q_NLD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else v_NLD.dtype
    q_NLD, k_NLD, v_NLD = (x.to(dtype) for x in (q_NLD, k_NLD, v_NLD))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        return Attention.apply(q_NLD, k_NLD, v_NLD, bias, scale)  # type: ignore[no-any-return,no-untyped-call]


@lru_cache(maxsize=2 * LONGEST // ALIGN)
def _causal_bias(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((1, length, length), float("-inf")).triu_(1).to(dtype)


def _additive(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask (true: look) as what is added to scores; an additive one as it is."""
    if attention_mask.dtype != torch.bool:
        return attention_mask
    bias = torch.zeros_like(attention_mask, dtype=dtype)
    return bias.masked_fill_(~attention_mask, float("-inf"))
