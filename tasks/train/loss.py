"""Losses that never hold more logits than they must.

A language model's head is its widest product: V logits for each of T tokens. Here it runs at
the N positions whose next token is learned, C of them at a time, and each block of logits
[C, V] becomes its gradient at once and is dropped, so that memory is C * V and not T * V.

Both losses are sums in float32; the caller divides by the answer tokens of the whole
optimiser step, so that cutting a step into micro-batches does not change what is learned.

Shapes: N learned positions, C of a block, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tasks.core.entities import IGNORED
from tasks.methods import soft
from tasks.train.batching import Batch

#: Bytes of logits that one block may have.
BLOCK_BYTES = 24 << 20
#: Positions are filled up to multiples of this: the number of answer tokens differs in every
#: batch, and oneDNN compiles a bfloat16 product anew, in some 5 ms, for every number.
ALIGN = 64
#: Kinds that scale what a head reads where it is the embeddings, and have no field that says so.
TIED_AND_SCALED = ("umt5", "switch_transformers")
#: A target's probability below which the loss is computed again: bfloat16 ends near 1e-38.
TINY = 1e-30


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i -log softmax(h_i W^T + b)[t_i], with the gradients made block by block in forward.

    d loss / d logits = softmax - onehot, so each block gives dh = dlogits W and
    dW += dlogits^T h before the next one is made. All of it is in `dtype`, sums are in float32.
    The target's own column is minus the sum of the others, and never p - 1: in bfloat16 that
    would be 0 or -1/256 for a confident answer, and this has 8 bits wherever it is.
    Idea: Liger kernels, Hsu et al. 2024, arXiv:2410.10989.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_N: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        h_NH, w_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        b_V = None if bias_V is None else bias_V.to(dtype)
        count, vocabulary = len(h_NH), len(w_VH)
        h_NH = F.pad(h_NH, (0, 0, 0, -count % ALIGN))
        block = _block(vocabulary, dtype)
        grad_hidden_NH = torch.empty_like(h_NH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(w_VH, dtype=torch.float32) if needs_weight else None
        grad_bias_V = torch.zeros(vocabulary, device=h_NH.device) if needs_bias else None
        loss = torch.zeros((), device=h_NH.device)
        with torch.autocast(h_NH.device.type, enabled=False):
            for start in range(0, len(h_NH), block):
                part = slice(start, start + block)
                h_CH, target_C = h_NH[part], target_N[part]
                p_CV = torch.softmax(F.linear(h_CH, w_VH, b_V), 1)
                # Fewer targets than rows of the block: the rest is fill.
                p_CV[len(target_C) :] = 0
                flat, cell_C = p_CV.view(-1), _cells(target_C, vocabulary)
                likely_C = flat[cell_C].float()
                # Not scatter_, which copies all of its input on a CPU.
                flat[cell_C] = 0
                rest_C = p_CV.sum(1)[: len(target_C)]
                loss += _surprise(likely_C, rest_C.float()).sum()
                if bool((likely_C < TINY).any()):
                    lost = likely_C < TINY
                    loss += _exactly(h_CH[: len(lost)][lost], w_VH, b_V, target_C[lost])
                if not any(ctx.needs_input_grad):
                    continue
                flat[cell_C] = -rest_C
                if grad_bias_V is not None:
                    grad_bias_V += p_CV.sum(0, dtype=torch.float32)
                if grad_hidden_NH is not None:
                    torch.mm(p_CV, w_VH, out=grad_hidden_NH[part])
                if grad_weight_VH is not None:
                    grad_weight_VH += p_CV.T @ h_CH
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH[:count]
        ctx.save_for_backward(grad_hidden_NH, grad_weight_VH, grad_bias_V)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if hidden is None else (hidden * grad).to(hidden_dtype),
            None if weight is None else (weight * grad).to(weight_dtype),
            None if bias is None else bias * grad,
            None,
            None,
        )


def loss_sum(model: nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """The summed loss of one micro-batch, a float32 scalar in nats."""
    assert batch.targets_N is not None
    if batch.predict_N is None:
        logits = soft.run(model, **batch.inputs).logits
        # [rows, classes], or [rows, L, classes] for every token.
        logits_NC = logits.float().flatten(0, -2)
        return F.cross_entropy(logits_NC, batch.targets_N, reduction="sum", ignore_index=IGNORED)
    hidden_NH = hidden_states(model, batch).index_select(0, batch.predict_N)
    return head_loss(output_head(model), hidden_NH, batch.targets_N, dtype)


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What a language model's head reads, for every position of a batch, [B * L, H], or of the
    targets of pairs, [B * D, H].

    Rows stand behind the virtual tokens of a soft prompt, which are none of these positions.
    """
    if batch.decoder_input_ids_BD is not None:
        return decoder_states(model, batch)
    arguments: dict[str, Any] = {
        "input_ids": batch.input_ids_BL,
        "attention_mask": batch.attention_mask_BL,
        "use_cache": False,
    }
    virtual = soft.virtual_tokens(model)
    if batch.row_ends is not None:
        assert batch.position_ids_BL is not None
        arguments["position_ids"] = batch.position_ids_BL + virtual
        arguments["cu_seq_lens_q"] = batch.row_ends
        if virtual:
            arguments["virtual"] = soft.keys_and_values(model)
    elif virtual:
        arguments = soft.behind(model, arguments)
    return backbone(model)(**arguments).last_hidden_state.flatten(0, 1)  # type: ignore[no-any-return]


def decoder_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the head of an encoder-decoder reads, [B * D, H]."""
    inner = unwrapped(model)
    arguments = {**batch.inputs, "decoder_input_ids": batch.decoder_input_ids_BD}
    if soft.virtual_tokens(model):
        arguments = soft.behind(model, arguments)
    ids_BD, prefix = arguments.pop("decoder_input_ids"), arguments.pop("past_key_values", None)
    source_BLH = inner.get_encoder()(**arguments).last_hidden_state
    states_BDH: torch.Tensor = inner.get_decoder()(
        input_ids=ids_BD,
        encoder_hidden_states=source_BLH,
        encoder_attention_mask=arguments["attention_mask"],
        past_key_values=prefix,
        use_cache=False,
    ).last_hidden_state * head_scale(inner.config)
    return states_BDH.flatten(0, 1)


def head_scale(config: Any) -> float:
    """What hidden states are multiplied with before the head reads them: T5 and its kin, with an
    embedding of length 1 a number for a head, width^-0.5 (Raffel et al. 2020, arXiv:1910.10683)."""
    scales = getattr(config, "scale_decoder_outputs", None)
    if scales is None:
        scales = config.model_type in TIED_AND_SCALED and config.tie_word_embeddings
    return float(config.d_model**-0.5) if scales else 1.0


def head_loss(
    head: nn.Module, hidden_NH: torch.Tensor, target_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The summed cross entropy of a language model's head at some hidden states."""
    if type(head) is nn.Linear:
        return LinearCrossEntropy.apply(hidden_NH, head.weight, head.bias, target_N, dtype)  # type: ignore[no-any-return,no-untyped-call]
    # A head that is itself adapted: the same blocks, recomputed in the backward pass.
    loss = torch.zeros((), device=hidden_NH.device)
    block = _block(output_width(head), torch.float32)
    for start in range(0, len(target_N), block):
        part = slice(start, start + block)
        loss = loss + checkpoint(
            _block_loss, head, hidden_NH[part], target_N[part], use_reentrant=False
        )
    return loss


def backbone(model: nn.Module) -> nn.Module:
    """The part of a causal model that ends in hidden states."""
    return unwrapped(model).base_model  # type: ignore[no-any-return]


def output_head(model: nn.Module) -> nn.Module:
    return unwrapped(model).get_output_embeddings()  # type: ignore[no-any-return,operator]


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, if there is one."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def output_width(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 0)) or 1 << 16


def _block(vocabulary: int, dtype: torch.dtype) -> int:
    """Positions of one block of logits."""
    return max(ALIGN, BLOCK_BYTES // (dtype.itemsize * vocabulary) // ALIGN * ALIGN)


def _cells(target_C: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Where the targets are in flattened logits, [C]."""
    return torch.arange(len(target_C), device=target_C.device) * vocabulary + target_C


def _surprise(likely_C: torch.Tensor, rest_C: torch.Tensor) -> torch.Tensor:
    """-log of each target's probability, from it or from that of all others, whichever is small
    and so exact; 0 where it is too small for either."""
    of_likely_C = -likely_C.clamp_min(TINY).log()
    surprise_C = torch.where(likely_C < 0.5, of_likely_C, -torch.log1p(-rest_C))
    return torch.where(likely_C < TINY, 0.0, surprise_C)


def _exactly(
    h_CH: torch.Tensor, w_VH: torch.Tensor, b_V: torch.Tensor | None, target_C: torch.Tensor
) -> torch.Tensor:
    """The summed loss from the logits themselves."""
    return F.cross_entropy(F.linear(h_CH, w_VH, b_V).float(), target_C, reduction="sum")


def _block_loss(head: nn.Module, h_CH: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(h_CH).float(), target_C, reduction="sum")
