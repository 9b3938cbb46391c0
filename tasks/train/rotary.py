"""Rotary position embeddings of Llama's kind, in half as many passes over memory.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x = [x1, x2] along the head

transformers writes x cos + [-x2, x1] sin: a negation, a copy, two products and a sum, for queries
and for keys, and autograd turns each around. Here both directions are a product and two
multiply-adds on the halves; turning back is turning by -sin.

Source: Su et al. 2021, arXiv:2104.09864. Shapes: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

NAME = "apply_rotary_pos_emb"


class Turned(torch.autograd.Function):
    """x [B, H, T, D] turned by the angles whose cos and sin are [B, 1, T, D] or alike."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, sin, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-way)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:], value=way)
    return y


def turn(
    theirs: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> Any:
    """transformers' `apply_rotary_pos_emb`, which is `theirs`; heads that are not turned whole
    are left to it."""
    if cos.shape[-1] != q.shape[-1]:
        return theirs(q, k, cos, sin, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Turned.apply(q, cos, sin), Turned.apply(k, cos, sin)  # type: ignore[no-untyped-call]


def fuse_rotary(model: nn.Module) -> int:
    """Give the attention of Llama's kind the path above. Returns how many modules.

    An attention module is of that kind if its forward calls a function of that name which gives
    the same numbers; its forward is then made anew with `turn` under that name. transformers'
    own modules stay as they are.
    """
    fused = 0
    for module in model.modules():
        forward = type(module).forward
        if isinstance(forward, FunctionType) and _fusible(module, forward):
            scope = {**forward.__globals__, NAME: partial(turn, forward.__globals__[NAME])}
            own = FunctionType(
                forward.__code__, scope, NAME, forward.__defaults__, forward.__closure__
            )
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = own.__get__(module)
            fused += 1
    return fused


def _fusible(module: nn.Module, forward: FunctionType) -> bool:
    theirs = forward.__globals__.get(NAME)
    if theirs is None or NAME not in forward.__code__.co_names or "forward" in vars(module):
        return False
    q, k = torch.linspace(-2, 3, 48).view(1, 2, 3, 8), torch.linspace(2, -1, 24).view(1, 1, 3, 8)
    # The angles of the halves differ, to tell this kind from one that pairs neighbours.
    angle = torch.linspace(0, 9, 24).view(1, 3, 8)
    # Some kinds cast back to the dtype of q where the angles are finer.
    return all(
        _same(theirs, q.to(dtype), k.to(dtype), angle) for dtype in (torch.float32, torch.bfloat16)
    )


def _same(
    theirs: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, angle: torch.Tensor
) -> bool:
    try:
        expected = theirs(q, k, angle.cos(), angle.sin())
    except (TypeError, RuntimeError):
        return False
    got = turn(theirs, q, k, angle.cos(), angle.sin())
    return len(expected) == 2 and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, atol=1e-6)
        for a, b in zip(got, expected, strict=True)
    )
