"""Virtual tokens of an encoder-decoder: before the source, or before what the decoder writes.

Prompt embeddings stand before what the encoder reads. It sees in both directions, so that they
are tokens of each row in its every layer, and the decoder looks at what came of them as it looks
at what came of the source. A prefix is keys and values before the decoder's first token, in its
attention to itself, the same for all rows. Both are PEFT's; Li & Liang 2021, arXiv:2101.00190, have
a prefix of the encoder and one of the attention to it besides.

Shapes: B rows, S positions of a source, D of a target, V virtual tokens, H model width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

#: Kinds whose encoder looks at a neighbourhood alone.
NEAR_SIGHTED = ("longt5", "led", "bigbird_pegasus", "pegasus_x")
#: Kinds that scale embeddings outside of the embedding, and not those that they are given.
SCALED_OUTSIDE = ("blenderbot-small",)


def is_pair_model(model: nn.Module) -> bool:
    """Whether an encoder reads and a decoder writes, of a base or one with an adapter."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads of keys, and their width, of the stack that a prefix stands in: a causal
    model's own, or the decoder beside an encoder."""
    config: Any = model.config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if is_pair_model(model):
        layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        heads = getattr(config, "decoder_attention_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(layers), int(getattr(config, "num_key_value_heads", None) or heads), int(width)


def behind(
    model: nn.Module, virtual: int, prefix: bool, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What the base is to be called with, so that its rows stand behind the virtual tokens.

    arguments: those of a whole pass, or of a step behind an earlier one: with `encoder_outputs`
        and the `past_key_values` of that pass.
    """
    return _with_prefix(model, arguments) if prefix else _with_prompt(model, virtual, arguments)


def _with_prefix(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments.get("past_key_values") is not None:
        return arguments
    peft: Any = model
    rows = len(arguments["decoder_input_ids"])
    with torch.autocast(peft.device.type, enabled=False):
        # As it is saved: what is trained under autocast must not be rounded where it is written.
        written = peft.get_prompt(1).self_attention_cache
    own = DynamicCache(
        [
            tuple(x.expand(rows, -1, -1, -1) for x in (one.keys, one.values))
            for one in written.layers
        ]
    )
    return {**arguments, "past_key_values": EncoderDecoderCache(own, DynamicCache())}


def _with_prompt(model: nn.Module, virtual: int, arguments: dict[str, Any]) -> dict[str, Any]:
    peft: Any = model
    arguments = dict(arguments)
    ids_BS = arguments.pop("input_ids", None)
    if arguments.get("attention_mask") is not None:
        arguments["attention_mask"] = F.pad(arguments["attention_mask"], (virtual, 0), value=1)
    if ids_BS is None:
        return arguments
    with torch.autocast(peft.device.type, enabled=False):
        prompt_1VH = peft.get_prompt(1)
    source_BSH = peft.word_embeddings(ids_BS)
    prompt_BVH = prompt_1VH.to(source_BSH.dtype).expand(len(ids_BS), -1, -1)
    return {**arguments, "inputs_embeds": torch.cat([prompt_BVH, source_BSH], dim=1)}
