"""How far a head is from the model, block by block, so that no step holds many logits.

Head k at position t should say what the model says at t + k. The model's distribution there is
made again from its own hidden state and the frozen lm_head, so it is never stored:

    loss = sum_k w_k sum_t [(1 - c) KL(p_(t+k) || q_k,t) - c log q_k,t(y_(t+k))]

p: softmax of the model's logits; q_k: of head k's; y: the token that was written; c: the hard
share. With W the lm_head's rows and E_q = sum_v q(v) W_v their mean under q,

    d loss / d h_k,t = w_k [E_q - m_(t+k)],   m_s = (1 - c) E_p(s) + c W_y(s),

so the model is one vector a position, which is made once and read by every head, and a block of
logits becomes its softmax, that its mean row, and both are dropped. Distillation of Medusa's
heads: Cai et al. 2024, arXiv:2401.10774, section 2.2; there with hard answers alone.

Shapes: T positions, C of which a head learns, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

#: Positions come in multiples of it: oneDNN compiles a product anew for each number of rows.
LANE = 128
#: Rows of the lm_head that are widened at a time.
CHUNK = 8192
#: Bytes of logits that one block may have, in float32. 512 rows of 2,048 tokens: the products run
#: at full speed, and what lies between them stays in the cache.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Scored:
    """The frozen lm_head: its rows, less their mean, and what it adds to each logit.

    What all rows share changes no probability and no difference of mean rows, but in 8 bits such a
    difference would be lost beside it; many models' rows share much.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> Scored:
        mean_D = weight_VD.mean(0, dtype=torch.float32)
        chunks = torch.split(weight_VD.detach(), CHUNK)
        parts = [(rows - mean_D).to(rows.dtype) for rows in chunks]
        return cls(torch.cat(parts), bias_V)

    def read(self, h_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E_q of each row, [C, D] in its dtype, and the logarithm of the sum that softmax divides
        by, [C] in float32."""
        logits_CV = F.linear(h_CD, self.weight_VD, self.bias_V)
        share_CV = logits_CV.softmax(-1, dtype=torch.float32)
        # The likeliest token's share is never near zero, and its logit says the sum.
        most_C, at_C = share_CV.max(-1)
        lse_C = logits_CV.gather(-1, at_C[:, None])[:, 0].float() - most_C.log()
        return share_CV.to(self.weight_VD.dtype) @ self.weight_VD, lse_C


@dataclass(frozen=True)
class Target:
    """What the model says at some positions: m (see above), and what of the loss no head changes,
    (1 - c) sum_v p(v) log p(v) less what a bias adds to both; float32."""

    mean_CD: torch.Tensor
    constant_C: torch.Tensor

    def at(self, places_N: torch.Tensor) -> Target:
        return Target(self.mean_CD[places_N], self.constant_C[places_N])


@torch.no_grad()
def target_of(x_CD: torch.Tensor, tokens_C: torch.Tensor, scored: Scored, hard: float) -> Target:
    """Of the model's own hidden states, in its dtype, and the tokens that were written there."""
    mean_CD = torch.empty_like(x_CD)
    constant_C = torch.empty(len(x_CD), dtype=torch.float32, device=x_CD.device)
    for part in blocks(len(x_CD), len(scored.weight_VD)):
        x_BD, y_B = x_CD[part], tokens_C[part]
        own_BD, lse_B = scored.read(x_BD)
        torch.lerp(own_BD, scored.weight_VD[y_B], hard, out=mean_CD[part])
        constant_C[part] = (1 - hard) * (dot(x_BD, own_BD) - lse_B)
        if scored.bias_V is not None:
            constant_C[part] -= hard * scored.bias_V[y_B].float()
    return Target(mean_CD, constant_C)


class HeadLoss(torch.autograd.Function):
    """One head's part of the loss above, a float32 scalar.

    h_CD: what the head would have the lm_head read, in the model's dtype. target: of the position
    that each foresees. weights_C: w, or 0 where there is nothing to foresee; float32.
    """

    @staticmethod
    def forward(
        ctx: Any, h_CD: torch.Tensor, target: Target, weights_C: torch.Tensor, scored: Scored
    ) -> torch.Tensor:
        grad_CD = torch.empty_like(h_CD)
        loss = torch.zeros((), dtype=torch.float32, device=h_CD.device)
        for part in blocks(len(h_CD), len(scored.weight_VD)):
            h_BD, mean_BD, weights_B = h_CD[part], target.mean_CD[part], weights_C[part]
            own_BD, lse_B = scored.read(h_BD)
            loss += (lse_B - dot(h_BD, mean_BD) + target.constant_C[part]) @ weights_B
            torch.sub(own_BD, mean_BD, out=grad_CD[part]).mul_(weights_B[:, None].to(h_CD.dtype))
        ctx.save_for_backward(grad_CD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_CD,) = ctx.saved_tensors
        return (grad_CD * grad.to(grad_CD.dtype), None, None, None)


def dot(a_CD: torch.Tensor, b_CD: torch.Tensor) -> torch.Tensor:
    """Of each row with its own, [C] in float32."""
    found: torch.Tensor = torch.linalg.vecdot(a_CD.float(), b_CD.float())
    return found


def lanes(count: int) -> int:
    """The next multiple of LANE."""
    return -(-count // LANE) * LANE


def blocks(length: int, vocabulary: int) -> Iterator[slice]:
    """Whole lanes, of whose logits none are more than BLOCK_BYTES (but for one lane)."""
    rows = max(LANE, BLOCK_BYTES // (4 * vocabulary) // LANE * LANE)
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))
