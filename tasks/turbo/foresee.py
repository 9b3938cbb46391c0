"""From which positions of some texts heads look ahead, and what they read there.

Shapes: T positions of the texts, C of them from which heads look ahead, K heads, D hidden width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.func import functional_call

from schemas.turbo import Turbo
from tasks.speculate.heads import TurboHeads
from tasks.speculate.parts import Parts
from tasks.turbo.loss import lanes
from tasks.turbo.states import Texts


def left(texts: Texts) -> torch.Tensor:
    """How many positions of its text come after each, [T]."""
    lengths_N = texts.offsets.diff()
    ends_T = torch.repeat_interleave(texts.offsets[1:], lengths_N)
    return ends_T - 1 - torch.arange(len(ends_T))


def learned_from(texts: Texts, turbo: Turbo, step: int) -> torch.Tensor:
    """The positions that a step learns from, [C]: a random share of those that have a token to
    foresee, drawn anew at each step."""
    useful = (left(texts) > 0).nonzero()[:, 0].numpy()
    drawn = np.random.default_rng([turbo.seed, 2, step]).permutation(useful)
    return torch.from_numpy(drawn[: math.ceil(turbo.positions * len(drawn))])


@dataclass(frozen=True)
class Ahead:
    """Positions to foresee from, those with most of their text still to come first, so that head k
    looks ahead from the first counts_K[k - 1] of them. They are filled up with the last one to
    whole lanes, and nothing is learned from what is filled up."""

    at_C: torch.Tensor
    counts_K: list[int]
    length: int

    @classmethod
    def of(cls, left_T: torch.Tensor, at_C: torch.Tensor, heads: int) -> Ahead:
        left_C, order_C = left_T[at_C].sort(descending=True, stable=True)
        filled = torch.arange(lanes(len(at_C))).clamp(max=len(at_C) - 1)
        counts_K = [int((left_C >= k).sum()) for k in range(1, heads + 1)]
        return cls(at_C[order_C][filled], counts_K, len(left_T))

    @property
    def rows_K(self) -> list[int]:
        return [lanes(count) for count in self.counts_K]

    def after(self, steps: int, k: int) -> torch.Tensor:
        """The positions so many tokens after those of head k; of a row that is filled up, any."""
        return (self.at_C[: self.rows_K[k - 1]] + steps).clamp(max=self.length - 1)


def foreseen(
    heads: TurboHeads,
    parts: Parts,
    x_TD: torch.Tensor,
    tokens_T: torch.Tensor,
    with_state: bool,
    ahead: Ahead,
) -> list[torch.Tensor]:
    """What each head would have the lm_head read, [rows, D] in the model's dtype; with the state,
    behind the tokens that were really written."""
    written = None
    if with_state and heads.config.state:
        # Head k follows the tokens written at t .. t + k - 1.
        every = [ahead.after(k - 1, k).to(x_TD.device) for k in range(1, heads.config.heads + 1)]
        written = [parts.embed(tokens_T[after_C]).detach() for after_C in every]
    weights = {name: weight.to(x_TD.dtype) for name, weight in heads.named_parameters()}
    x_CD = x_TD[ahead.at_C.to(x_TD.device)]
    found: list[torch.Tensor] = functional_call(heads, weights, (x_CD, ahead.rows_K, written))
    return found
