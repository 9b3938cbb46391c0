"""Packed rows behind the virtual tokens of a soft prompt, for attention alone.

All layers but attention work token by token and see the real tokens only. In attention every
packed row stands behind V keys and values that all rows share (`tasks/methods/soft.py`): here
they are laid in front of each of them, and the attention of packed rows does the rest. A virtual
token asks nothing; what comes out at its place is dropped.

Shapes: T tokens of a pack, R rows, P = T + R * V places, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pack are when each row has its virtual tokens in front.

    row_ends: [R + 1], of the longer rows.
    source_P: what stands at each place, among V virtual tokens and T real ones, end to end.
    real_T, virtual_RV: the places of each.
    """

    row_ends: torch.Tensor
    source_P: torch.Tensor
    real_T: torch.Tensor
    virtual_RV: torch.Tensor


@lru_cache(maxsize=64)
def places(row_ends: torch.Tensor, virtual: int) -> Places:
    """Every layer of a forward pass asks for the same ones, by the same tensor.

    row_ends: [R + 1], from 0: where packed rows begin and end.
    """
    ends = row_ends.numpy().astype(np.int64)
    rows = np.arange(len(ends))
    longer = ends + rows * virtual
    row_P = np.repeat(rows[:-1], np.diff(longer))
    within_P = np.arange(longer[-1]) - longer[row_P]
    # Virtual token number `within`, or V + (the row's start + within - V) among both.
    source_P = np.where(within_P < virtual, within_P, ends[row_P] + within_P)
    return Places(
        torch.from_numpy(longer.astype(np.int32)),
        torch.from_numpy(source_P),
        torch.from_numpy(np.flatnonzero(within_P >= virtual)),
        torch.from_numpy(np.flatnonzero(within_P < virtual)),
    )


class Laid(torch.autograd.Function):
    """x_PHD from real tokens x_THD and virtual ones x_VHD. The gradients are gathered: that of
    an index_select on a CPU adds row by row."""

    @staticmethod
    def forward(
        ctx: Any, real_THD: torch.Tensor, virtual_VHD: torch.Tensor, where: Places
    ) -> torch.Tensor:
        ctx.where, ctx.virtual = where, virtual_VHD.shape
        return torch.cat([virtual_VHD, real_THD]).index_select(0, where.source_P)

    @staticmethod
    def backward(ctx: Any, dx_PHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        where, dvirtual = ctx.where, None
        if ctx.needs_input_grad[1]:
            dvirtual = dx_PHD.index_select(0, where.virtual_RV).view(-1, *ctx.virtual).sum(0)
        return dx_PHD.index_select(0, where.real_T), dvirtual, None


class Kept(torch.autograd.Function):
    """x_THD from x_PHD: what comes out at the real tokens."""

    @staticmethod
    def forward(ctx: Any, x_PHD: torch.Tensor, virtual: int, where: Places) -> torch.Tensor:
        ctx.where, ctx.virtual = where, virtual
        return x_PHD.index_select(0, where.real_T)

    @staticmethod
    def backward(ctx: Any, dx_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        nothing = dx_THD.new_zeros(ctx.virtual, *dx_THD.shape[1:])
        return torch.cat([nothing, dx_THD]).index_select(0, ctx.where.source_P), None, None


def lay(real_1HTD: torch.Tensor, virtual_1HVD: torch.Tensor, where: Places) -> torch.Tensor:
    """[1, H, T, D] with virtual tokens in front of each row: [1, H, P, D]."""
    real_THD, virtual_VHD = (x[0].transpose(0, 1) for x in (real_1HTD, virtual_1HVD))
    laid_PHD: torch.Tensor = Laid.apply(real_THD, virtual_VHD.to(real_THD.dtype), where)  # type: ignore[no-untyped-call]
    return laid_PHD.transpose(0, 1)[None]
