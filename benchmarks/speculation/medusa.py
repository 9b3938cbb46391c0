"""Medusa-1 (Cai et al. 2024, arXiv:2401.10774), to be drafted with by our loop.

    logits_k = L_k (x + SiLU(W_k x + b_k))

one residual block of full rank, zero at the start, and an lm_head L_k of its own for each head,
which starts as the model's: K (d^2 + d + d V) parameters. Loss: cross-entropy with the token that
was written, head k weighted 0.8^k. Trained here on the same stored states as Turbo's heads, in the
same order, for the same steps and with AdamW and the same clipping, schedule and batches; the rate
is Medusa's own (1e-3).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from schemas.turbo import Turbo
from tasks.core.plan import Plan
from tasks.core.schedule import learning_rate, total_steps
from tasks.speculate.heads import HeadsConfig
from tasks.speculate.parts import Parts
from tasks.turbo.distil import left, schedule_of
from tasks.turbo.states import States, Texts

LEARNING_RATE = 1e-3


class MedusaHeads(nn.Module):
    """Heads for `tasks.speculate.tree.draft`: without a state, and with lm_heads of their own."""

    def __init__(self, heads: int, lm_head: torch.Tensor) -> None:
        super().__init__()
        vocabulary, d = lm_head.shape
        self.config = HeadsConfig(heads, 0, 0, d, vocabulary)
        self.block_KDD = nn.Parameter(torch.zeros(heads, d, d))
        self.bias_KD = nn.Parameter(torch.zeros(heads, d))
        self.lm_KVD = nn.Parameter(lm_head.detach().float().repeat(heads, 1, 1))

    def head(self, k: int, x_ND: torch.Tensor) -> torch.Tensor:
        """Logits of head k (from 0), [N, V]."""
        block_ND = F.linear(x_ND, self.block_KDD[k], self.bias_KD[k])
        return F.linear(x_ND + F.silu(block_ND), self.lm_KVD[k])

    def logits(
        self, x_ND: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor], count: int
    ) -> torch.Tensor:
        """[K, N, V] of the first `count` heads. lm_head: the model's, which these do not ask."""
        return torch.stack([self.head(k, x_ND) for k in range(count)])

    @property
    def parameters_count(self) -> int:
        return sum(weight.numel() for weight in self.parameters())
