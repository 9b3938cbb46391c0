"""How far each head is from the model, block by block, so that no epoch holds many logits.

Head k at position t should say what the model says at t + k. The model's distribution there is
made again from its own hidden state and the frozen lm_head, so it is never stored:

    loss = sum_k w_k sum_t [(1 - c) KL(p_(t+k) || q_k,t) - c log q_k,t(y_(t+k))]

p: softmax of the model's logits; q_k: of head k's; y: the token that was written; c: the hard
share. d loss / d logits = w_k (q - (1 - c) p - c onehot(y)), so a block of logits becomes its
gradient at once and is dropped. Distillation of Medusa's heads: Cai et al. 2024,
arXiv:2401.10774, section 2.2; there with hard answers alone.

Shapes: T positions, C of a block, K heads, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

#: Bytes of logits that one block may have.
BLOCK_BYTES = 24 << 20


class HeadsLoss(torch.autograd.Function):
    """The loss above, a float32 scalar, from what each head would have the lm_head read.

    h_KTD: of head k in place k - 1. x_TD: the model's own. weight_VD: of the lm_head. tokens_T:
    written at each position. left_T: positions of its text that come after it. weights_K: w.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_KTD: torch.Tensor,
        x_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        tokens_T: torch.Tensor,
        left_T: torch.Tensor,
        weights_K: list[float],
        hard: float,
    ) -> torch.Tensor:
        count, length = len(h_KTD), len(x_TD)
        h_dtype, dtype = h_KTD.dtype, weight_VD.dtype
        grad_KTD = torch.zeros_like(h_KTD)
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        # Logits of the model, of a head, and what is made of them, in float32.
        block = max(16, BLOCK_BYTES // (4 * 4 * len(weight_VD)))
        for start in range(0, length, block):
            own_TD = x_TD[start : start + block + count]
            p_TV = _logits(own_TD.to(dtype), weight_VD, bias_V).log_softmax(-1)
            for k in range(1, count + 1):
                end = min(start + block, length - k)
                if end <= start:
                    continue
                told_C = left_T[start:end] >= k
                at_C = told_C.nonzero()[:, 0]
                if not len(at_C):
                    continue
                h_CD = h_KTD[k - 1, start:end][at_C].to(dtype)
                q_CV = _logits(h_CD, weight_VD, bias_V).log_softmax(-1)
                teacher_CV = p_TV[k : k + end - start][at_C]
                share_CV = teacher_CV.exp()
                y_C = tokens_T[start + k : end + k][at_C].long()
                divergence = (share_CV * (teacher_CV - q_CV)).sum()
                surprise = -q_CV.gather(1, y_C[:, None]).sum()
                loss += weights_K[k - 1] * ((1 - hard) * divergence + hard * surprise)
                grad_CV = q_CV.exp_().sub_(share_CV, alpha=1 - hard)
                grad_CV[torch.arange(len(y_C), device=y_C.device), y_C] -= hard
                grad_CD = (grad_CV.to(dtype) @ weight_VD).to(h_dtype)
                grad_KTD[k - 1, start + at_C] = grad_CD * weights_K[k - 1]
        ctx.save_for_backward(grad_KTD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (grad_KTD,) = ctx.saved_tensors
        return (grad_KTD * grad, None, None, None, None, None, None, None)


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    logits: torch.Tensor = torch.nn.functional.linear(hidden_CD, weight_VD, bias_V)
    return logits.float()
