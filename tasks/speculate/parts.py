"""A causal model in the three parts that decoding calls by itself: embeddings, layers, lm_head.

Between layers and lm_head stands x, from which the heads draft, and the verified tokens and the
drafts go through the same lm_head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache


class NotSpeculableError(ValueError):
    """A model of which drafts cannot be verified exactly, with the reason."""


#: Keys and values of virtual tokens, [1, H, V, E] each, layer by layer.
Before = tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True)
class Parts:
    """model: the whole, with its adapters inside. layers: gives x. lm_head: logits of x.

    before: of a soft prompt, the keys and values of its virtual tokens in each layer. prompted:
    PEFT's model that it was read from.
    """

    model: Any
    layers: Any
    lm_head: nn.Module
    before: Before = ()
    prompted: Any = None

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
        """Positions that the model has for a row, or None where it says nothing."""
        known = getattr(self.config, "max_position_embeddings", None)
        return None if known is None else known - self.virtual

    @property
    def virtual(self) -> int:
        """Virtual tokens before each row."""
        return self.before[0][0].shape[2] if self.before else 0

    def read(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """x_BTD of rows of one length, or filled up behind, by a plain pass of the model."""
        cache = None
        if self.before:
            rows = len(ids_BT)
            cache = DynamicCache(
                [tuple(part.expand(rows, -1, -1, -1) for part in layer) for layer in self.before]
            )
        hidden: torch.Tensor = self.layers(
            input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None
        )[0]
        return hidden


@torch.inference_mode()
def parts_of(model: Any) -> Parts:
    """The parts of a causal language model, plain or with PEFT adapters in its layers or a soft
    prompt before its rows.

    Raises:
        NotSpeculableError: no decoder, an attention window or a state of another kind than keys
            and values of all tokens, or an lm_head that is not all there is between x and the
            logits.
    """
    whole = model
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
    if getattr(getattr(whole, "active_peft_config", None), "is_prompt_learning", False):
        parts = replace(parts, before=soft_prompt(whole, parts), prompted=whole)
    return parts


def soft_prompt(model: Any, parts: Parts) -> Before:
    """Keys and values of a soft prompt's virtual tokens, which all rows share: a prefix's as they
    were learned, those of prompt embeddings by one pass."""
    prompt = model.get_prompt(1)
    if not isinstance(prompt, Cache):
        cache = DynamicCache()
        embeds_1VH = prompt.to(parts.model.get_input_embeddings().weight.dtype)
        parts.layers(inputs_embeds=embeds_1VH, past_key_values=cache, use_cache=True)
        prompt = cache
    return tuple((layer.keys, layer.values) for layer in prompt.layers)


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
