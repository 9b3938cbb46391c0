"""Medusa-1 (Cai et al. 2024, arXiv:2401.10774), to be drafted with by our loop.

    logits_k = L_k (x + SiLU(W_k x + b_k))

one residual block of full rank, zero at the start, and an lm_head L_k of its own for each head,
which starts as the model's: K (d^2 + d + d V) parameters. Loss: cross-entropy with the token that
was written, head k weighted 0.8^k. Trained here on the same stored states as Turbo's heads, in the
same order, for the same steps and with AdamW and the same clipping, schedule and batches; the rate
is Medusa's own (1e-3) where none is named.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from speculation.material import Learned
from torch import nn

from schemas.turbo import Turbo
from tasks.core.plan import Plan
from tasks.core.schedule import learning_rate, total_steps
from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.speculate.parts import Parts
from tasks.turbo.distil import left, schedule_of
from tasks.turbo.states import Texts

LEARNING_RATE = 1e-3


class MedusaHeads(TurboHeads):
    """Drafted with as Turbo's heads without a state are; the logits are made otherwise."""

    def __init__(self, heads: int, lm_head: torch.Tensor) -> None:
        nn.Module.__init__(self)
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


def train_medusa(
    parts: Parts, material: Learned, turbo: Turbo, rate: float = LEARNING_RATE
) -> MedusaHeads:
    """Heads trained on the chosen texts, as many and for as many steps as `turbo` says, at a
    learning rate of their own."""
    states, chosen = material.states, material.chosen
    heads = MedusaHeads(turbo.heads, parts.scored)
    schedule = schedule_of(turbo).model_copy(update={"learning_rate": rate})
    plan = Plan(states.lengths[chosen], turbo.batch_tokens, turbo.seed)
    steps = total_steps(schedule, plan.steps_per_epoch)
    optimizer = torch.optim.AdamW(heads.parameters(), weight_decay=0.0, fused=True)
    order: list[np.ndarray] = []
    for step in range(steps):
        if step % plan.steps_per_epoch == 0:
            order = list(plan.epoch(step // plan.steps_per_epoch))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, steps)
        texts = states.texts(chosen[order[step % plan.steps_per_epoch]])
        # As Turbo's heads: products in the model's dtype, weights in float32.
        with torch.autocast("cpu", parts.scored.dtype, enabled=parts.scored.dtype != torch.float32):
            loss = medusa_loss(heads, texts, turbo.decay)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return heads.requires_grad_(False).eval()


def medusa_loss(heads: MedusaHeads, texts: Texts, decay: float) -> torch.Tensor:
    """The mean over what the heads foresee, each head weighted decay^k, in nats."""
    x_TD, tokens_T, left_T = texts.states_TD.float(), texts.tokens_T.long(), left(texts)
    loss, total = torch.zeros(()), 0.0
    for k in range(1, heads.config.heads + 1):
        at_C = (left_T >= k).nonzero()[:, 0]
        if not len(at_C):
            continue
        logits_CV = heads.head(k - 1, x_TD[at_C]).float()
        loss = loss + decay**k * F.cross_entropy(logits_CV, tokens_T[at_C + k], reduction="sum")
        total += decay**k * len(at_C)
    return loss / max(total, 1e-9)


def saved_medusa(
    path: Path, parts: Parts, material: Callable[[], Learned], turbo: Turbo
) -> MedusaHeads:
    """Trained now, if they are not there. material: made only then."""
    heads = MedusaHeads(turbo.heads, parts.scored)
    if not path.is_file():
        heads = train_medusa(parts, material(), turbo)
        save_file(heads.state_dict(), path)
    heads.load_state_dict(load_file(path))
    return heads.requires_grad_(False).eval()
