"""Which token the model writes at each node: the likeliest, or one drawn from its distribution.

A draft is accepted where it is that very token. Drafts are not drawn but listed, so this keeps
the model's distribution exactly, and no rejected part has to be drawn again: at each node the
token is the model's own, whatever was drafted. Each position of an answer has one number between
0 and 1, drawn before it is written, and takes the token in whose share of the distribution that
number falls: with and without heads, the same numbers write the same answer.

Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Choice(Protocol):
    """How tokens are chosen."""

    def __call__(
        self, logits_BNV: torch.Tensor, rows: Sequence[int], position_BN: torch.Tensor
    ) -> torch.Tensor:
        """The token that follows each node, [B, N].

        rows: which answers these are. position_BN: the place in its answer of what is chosen.
        """


class Greedy:
    """The likeliest token; of several, the first."""

    def __call__(
        self, logits_BNV: torch.Tensor, rows: Sequence[int], position_BN: torch.Tensor
    ) -> torch.Tensor:
        return logits_BNV.argmax(-1)


class Sampled:
    """A token of the model's own distribution, as `temperature`, `top_k`, `top_p` and `min_p`
    shape it (transformers' own, in transformers' order)."""

    def __init__(
        self,
        rows: int,
        longest: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        """rows, longest: of the answers. seed: None: from torch's own generator."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.drawn = torch.rand((rows, longest), dtype=torch.float64, generator=generator)
        shapers: list[Any] = []
        if temperature != 1.0:
            shapers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            shapers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            shapers.append(TopPLogitsWarper(top_p))
        if min_p is not None:
            shapers.append(MinPLogitsWarper(min_p))
        self.shape = LogitsProcessorList(shapers)

    def __call__(
        self, logits_BNV: torch.Tensor, rows: Sequence[int], position_BN: torch.Tensor
    ) -> torch.Tensor:
        logits_MV = self.shape(None, logits_BNV.float().flatten(0, 1))
        # Summed in double: a vocabulary's small shares would vanish beside a sum near 1.
        share_MV = logits_MV.softmax(-1).cumsum(-1, dtype=torch.float64)
        self.drawn = self.drawn.to(share_MV.device)
        last = self.drawn.shape[1] - 1
        row_B1 = torch.tensor(rows, device=share_MV.device)[:, None]
        # Behind an answer's end nothing is kept of what is chosen.
        drawn_BN = self.drawn[row_B1, position_BN.clamp(max=last)]
        # Of the sum, which rounding leaves near 1, so that the last share ends where it should.
        drawn_M1 = drawn_BN.flatten()[:, None] * share_MV[:, -1:]
        chosen_M1 = torch.searchsorted(share_MV, drawn_M1, right=True)
        return chosen_M1.clamp(max=share_MV.shape[1] - 1).view(position_BN.shape)


class NotBefore:
    """Another choice, kept from tokens that would end an answer before it is long enough."""

    def __init__(self, choice: Choice, ends: frozenset[int], shortest: int) -> None:
        """shortest: tokens that an answer has before one of `ends` may come."""
        self.choice, self.ends, self.shortest = choice, sorted(ends), shortest

    def __call__(
        self, logits_BNV: torch.Tensor, rows: Sequence[int], position_BN: torch.Tensor
    ) -> torch.Tensor:
        early_BN1 = (position_BN < self.shortest)[..., None]
        logits_BNV = logits_BNV.clone()
        logits_BNV[..., self.ends] = logits_BNV[..., self.ends].masked_fill(early_BN1, -torch.inf)
        return self.choice(logits_BNV, rows, position_BN)
