"""A causal model in the three parts that decoding calls by itself: embeddings, layers, lm_head.

Between layers and lm_head stands x, from which the heads draft, and the verified tokens and the
drafts go through the same lm_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class NotSpeculableError(ValueError):
    """A model of which drafts cannot be verified exactly, with the reason."""


@dataclass(frozen=True)
class Parts:
    """model: the whole, with its adapters inside. layers: gives x. lm_head: logits of x."""

    model: Any
    layers: Any
    lm_head: nn.Module

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        return self.scored.device

    @property
    def scored(self) -> torch.Tensor:
        """The weight of the lm_head, [V, D]."""
        weight: torch.Tensor = self.lm_head.weight  # type: ignore[assignment]
        return weight

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.get_input_embeddings()(ids)
        return found

    @property
    def longest(self) -> int | None:
        """Positions that the model knows, or None where it says nothing."""
        return getattr(self.config, "max_position_embeddings", None)


@torch.inference_mode()
def parts_of(model: Any) -> Parts:
    """The parts of a causal language model, plain or with PEFT adapters in its layers.

    Raises:
        NotSpeculableError: no decoder, an attention window or a state of another kind than keys
            and values of all tokens, virtual tokens, or an lm_head that is not all there is
            between x and the logits.
    """
    peft_config = getattr(model, "active_peft_config", None)
    if getattr(peft_config, "is_prompt_learning", False):
        raise NotSpeculableError(
            "a soft prompt stands before every row, which the draft's passes do not write; train "
            "heads on a candidate whose adapters are in the layers"
        )
    model = getattr(model, "get_base_model", lambda: model)()
    if getattr(model.config, "is_encoder_decoder", False):
        raise NotSpeculableError("an encoder with a decoder: heads are for causal models")
    lm_head = model.get_output_embeddings()
    if lm_head is None:
        raise NotSpeculableError(
            f"{type(model).__name__} has no lm_head: heads are for causal language models"
        )
    layers = getattr(model, model.base_model_prefix, None)
    if layers is None or getattr(model, "_is_stateful", False):
        raise NotSpeculableError(f"{type(model).__name__} keeps a state of another kind")
    parts = Parts(model, layers, lm_head)
    config = parts.config
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or []
    others = sorted(set(kinds) - {"full_attention", "global"})
    # Where each layer's kind is named, only those of a kind of their own have a window.
    window = None if kinds else getattr(config, "sliding_window", None)
    if others or window:
        raise NotSpeculableError(
            f"{type(model).__name__} has layers of another kind ({', '.join(others) or 'window'}, "
            f"sliding_window {window}); drafts are verified by layers that attend to all tokens"
        )
    if not parts.scored.is_floating_point():
        raise NotSpeculableError("the lm_head is quantised, and heads need its rows as numbers")
    require_causal(parts)
    require_plain_head(parts)
    return parts


def require_causal(parts: Parts) -> None:
    """Raise where a token's x depends on what comes after it."""
    known = parts.config.vocab_size
    one_1T, other_1T = (
        torch.tensor([[1, 2, last]], device=parts.device) % known for last in (3, 4)
    )
    x_1TD, other_1TD = (
        parts.layers(input_ids=ids_1T, use_cache=False)[0][:, :2].float()
        for ids_1T in (one_1T, other_1T)
    )
    if not torch.allclose(x_1TD, other_1TD, rtol=1e-3, atol=1e-3):
        raise NotSpeculableError(
            f"{type(parts.model).__name__} is an encoder (each token sees those after it): heads "
            "are for causal language models"
        )


def require_plain_head(parts: Parts) -> None:
    """Raise where the model scales or caps what its lm_head gives: drafts would be verified by
    other logits than it has."""
    ids_1T = torch.arange(1, 4, device=parts.device)[None] % parts.config.vocab_size
    whole_1TV = parts.model(input_ids=ids_1T, use_cache=False).logits
    apart_1TV = parts.lm_head(parts.layers(input_ids=ids_1T, use_cache=False)[0])
    if whole_1TV.shape != apart_1TV.shape or not torch.allclose(
        whole_1TV.float(), apart_1TV.float(), rtol=1e-3, atol=1e-3
    ):
        raise NotSpeculableError(
            f"{type(parts.model).__name__} does more than its lm_head between the last layer and "
            "the logits (a scale, a cap), which heads do not know"
        )
