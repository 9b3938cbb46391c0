"""Attention for training on a CPU: causal over packed rows, or with a padding mask.

PyTorch's fused CPU attention is fast forward and slow backward in bfloat16: for 768 heads of
16 tokens its backward takes 50 ms on one core where the products themselves take 1 ms
(docs/train.md). Here both directions are batched products, which run on the matrix units:

    P  = softmax(s Q K^T + bias)        O  = P V
    dV = P^T dO                         dP = dO V^T
    dS = P * (dP - rowsum(dP * P))      dQ = s dS K,  dK = s dS^T Q

P is kept, L * L for each head, so rows longer than `LONGEST` go to PyTorch's kernel. Packed
rows are cut apart before the products (`tasks/train/grids.py`): there is nothing through which
one could see another.

Shapes: B batch, H heads, N = B * H, L tokens, D head width; T tokens of a pack, K heads of keys
and values, G = H / K queries to each, R rows of a grid.
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

from tasks.methods.soft import Layers
from tasks.train.grids import Grid, Grids, grids
from tasks.train.virtual import Kept, lay, places

NAME = "peftflow_cpu"
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
        o_NLD, p_NLL = _forward(q_NLD, k_NLD, v_NLD, bias, scale)
        ctx.scale = scale
        ctx.save_for_backward(q_NLD, k_NLD, v_NLD, p_NLL)
        return o_NLD

    @staticmethod
    def backward(ctx: Any, do_NLD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q_NLD, k_NLD, v_NLD, p_NLL = ctx.saved_tensors
        return *_backward(do_NLD, q_NLD, k_NLD, v_NLD, p_NLL, ctx.scale), None, None


class PackedAttention(torch.autograd.Function):
    """O_THD from q_THD, k_TKD and v_TKD of packed rows, each by itself, causal or not."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        cells: Grids,
        scale: float,
        causal: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        width, groups = q_THD.shape[2], q_THD.shape[1] // k_TKD.shape[1]
        q_ND, k_ND, v_ND = (x.reshape(-1, width).to(dtype) for x in (q_THD, k_TKD, v_TKD))
        outputs, saved = [], []
        for grid in cells.grids:
            shape = (-1, grid.length, width)
            q_NLD = q_ND.index_select(0, grid.queries).view(-1, groups * grid.length, width)
            k_NLD = k_ND.index_select(0, grid.keys).view(shape)
            v_NLD = v_ND.index_select(0, grid.keys).view(shape)
            bias = _causal_bias(grid.length, dtype, groups) if causal else _row_bias(grid, dtype)
            o_NLD, p_NLL = _forward(q_NLD, k_NLD, v_NLD, bias, scale)
            outputs.append(o_NLD.view(-1, width))
            saved += [q_NLD, k_NLD, v_NLD, p_NLL]
        ctx.cells, ctx.scale, ctx.dtype = cells, scale, dtype
        ctx.shapes = [(x.shape, x.dtype) for x in (q_THD, k_TKD, v_TKD)]
        ctx.save_for_backward(*saved)
        return _joined(outputs).index_select(0, cells.place_TH).view(q_THD.shape)

    @staticmethod
    def backward(ctx: Any, do_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        cells: Grids = ctx.cells
        width = do_THD.shape[2]
        do_ND = do_THD.reshape(-1, width).to(ctx.dtype)
        parts: tuple[list[torch.Tensor], ...] = ([], [], [])
        # Asked for once: under gradient checkpointing a second time is an error.
        saved = ctx.saved_tensors
        for number, grid in enumerate(cells.grids):
            q_NLD, k_NLD, v_NLD, p_NLL = saved[4 * number : 4 * number + 4]
            # A query that only fills the grid has no gradient to give to real keys.
            do_NLD = do_ND.index_select(0, grid.queries).mul_(grid.real_N1).view_as(q_NLD)
            for part, grad in zip(
                parts, _backward(do_NLD, q_NLD, k_NLD, v_NLD, p_NLL, ctx.scale), strict=True
            ):
                part.append(grad.view(-1, width))
        places = (cells.place_TH, cells.place_TK, cells.place_TK)
        grads = [
            _joined(part).index_select(0, place).view(shape).to(dtype)
            for part, place, (shape, dtype) in zip(parts, places, ctx.shapes, strict=True)
        ]
        return *grads, None, None, None, None


def _forward(
    q_NLD: torch.Tensor,
    k_NLD: torch.Tensor,
    v_NLD: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and P."""
    if bias is None:
        p_NLL = (q_NLD * scale) @ k_NLD.transpose(1, 2)
    else:
        shape = (len(q_NLD), q_NLD.shape[1], k_NLD.shape[1])
        p_NLL = torch.baddbmm(bias.expand(shape), q_NLD, k_NLD.transpose(1, 2), alpha=scale)
    p_NLL = torch.softmax(p_NLL, -1)
    return p_NLL @ v_NLD, p_NLL


def _backward(
    do_NLD: torch.Tensor,
    q_NLD: torch.Tensor,
    k_NLD: torch.Tensor,
    v_NLD: torch.Tensor,
    p_NLL: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV."""
    dv_NLD = p_NLL.transpose(1, 2) @ do_NLD
    ds_NLL = torch._softmax_backward_data(do_NLD @ v_NLD.transpose(1, 2), p_NLL, -1, p_NLL.dtype)
    dq_NLD = (ds_NLL @ k_NLD).mul_(scale)
    dk_NLD = (ds_NLL.transpose(1, 2) @ q_NLD).mul_(scale)
    return dq_NLD, dk_NLD, dv_NLD


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    virtual: Layers | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q, k, v [B, H, L, D] to [B, L, H, D].

    cu_seq_lens_q: where packed rows start and end, [rows + 1], in a batch of one.
    virtual: keys and values that each packed row stands behind, by layer.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cu_seq_lens_q is not None:
        assert attention_mask is None, "packed rows have no mask"
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if virtual is not None:
            layer = virtual[module.layer_idx]  # type: ignore[index]
            return _behind(query, key, value, cu_seq_lens_q, scale, layer)[None], None
        return _packed(query, key, value, cu_seq_lens_q, scale, causal)[None], None
    # Under autocast rotary embeddings leave q and k in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
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


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_ends: torch.Tensor,
    scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """Attention of packed rows, from [1, H, T, D] and [1, K, T, D] to [T, H, D]."""
    heads, width = query.shape[1], query.shape[3]
    dtype = _dtype(value)
    lengths = row_ends.diff()
    if int(lengths.max()) > LONGEST:
        # split, not slices: a slice's gradient is a whole tensor of zeros with the slice in it.
        parts = (torch.split(x.to(dtype), lengths.tolist(), 2) for x in (query, key, value))
        rows = [
            F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(rows, dim=2)[0].transpose(0, 1)
    cells = grids(row_ends, heads, key.shape[1], heads * width)
    q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    with torch.autocast(value.device.type, enabled=False):
        return PackedAttention.apply(q_THD, k_TKD, v_TKD, cells, scale, causal, dtype)  # type: ignore[no-any-return,no-untyped-call]


def _behind(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row_ends: torch.Tensor,
    scale: float,
    layer: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """`_packed`, causal, of rows that each stand behind the keys and values of `layer`,
    [1, K, V, D]."""
    count = layer[0].shape[2]
    where = places(row_ends, count)
    unasked = query.new_zeros(1, query.shape[1], count, query.shape[3])
    query = lay(query, unasked, where)
    key, value = lay(key, layer[0], where), lay(value, layer[1], where)
    out_PHD = _packed(query, key, value, where.row_ends, scale)
    return Kept.apply(out_PHD, count, where)  # type: ignore[no-any-return,no-untyped-call]


def _product(
    q_NLD: torch.Tensor,
    k_NLD: torch.Tensor,
    v_NLD: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The products in one dtype, autocast's if it is on: rotary embeddings leave q and k in
    float32 where v is bfloat16, and a backward pass has no autocast to make them one."""
    dtype = _dtype(v_NLD)
    q_NLD, k_NLD, v_NLD = (x.to(dtype) for x in (q_NLD, k_NLD, v_NLD))
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(v_NLD.device.type, enabled=False):
        return Attention.apply(q_NLD, k_NLD, v_NLD, bias, scale)  # type: ignore[no-any-return,no-untyped-call]


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    """What products run in: autocast's dtype if it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@lru_cache(maxsize=64)
def _causal_bias(length: int, dtype: torch.dtype, groups: int = 1) -> torch.Tensor:
    """[1, G * L, L]: minus infinity where a query would look ahead."""
    bias = torch.full((1, length, length), float("-inf")).triu_(1).to(dtype)
    return bias.repeat(1, groups, 1)


def _row_bias(grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """[K * R, 1, L]: minus infinity where a key only fills the grid."""
    heads = len(grid.keys) // grid.real_RL.numel()
    # A row of nothing but fill looks at its first cell, so that its softmax is a number.
    looked_RL = grid.real_RL.clone()
    looked_RL[:, 0] = True
    bias_RL = torch.zeros(looked_RL.shape, dtype=dtype).masked_fill_(~looked_RL, float("-inf"))
    return bias_RL.repeat(heads, 1)[:, None]


def _additive(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask (true: look) as what is added to scores; an additive one as it is."""
    if attention_mask.dtype != torch.bool:
        return attention_mask
    bias = torch.zeros_like(attention_mask, dtype=dtype)
    return bias.masked_fill_(~attention_mask, float("-inf"))
