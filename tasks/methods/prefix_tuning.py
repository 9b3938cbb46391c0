"""Prefix tuning: the keys and values of V virtual tokens are learned, in every layer.

Li & Liang 2021, arXiv:2101.00190. With L layers (of the decoder, where there is an encoder too) and
k the width of a layer's keys (heads of keys times their width), it trains V * 2 * L * k weights;
with `projection` V * k embeddings and two linear layers, k to h to 2 * L * k, of which only what
comes out is kept. For classification the head learns too.
"""

from __future__ import annotations

from peft import PrefixTuningConfig, PromptLearningConfig
from transformers import PreTrainedModel

from schemas.candidates import PrefixTuning
from tasks.methods import soft
from tasks.methods.method import Method, head_parameters
from tasks.methods.soft_pairs import decoder_shape, is_pair_model


def config(model: PreTrainedModel, candidate: PrefixTuning, task: str) -> PromptLearningConfig:
    """What PEFT is told.

    Raises:
        UserError: a base whose layers do not see all virtual tokens.
    """
    return soft.config(
        model,
        candidate,
        task,
        PrefixTuningConfig,
        # PEFT makes it that of keys, where they have fewer heads.
        token_dim=key_width(model) if is_pair_model(model) else model.config.hidden_size,
        prefix_projection=candidate.projection,
        encoder_hidden_size=candidate.hidden_size,
        needs_cache=True,
    )


def trainable_parameters(model: PreTrainedModel, candidate: PrefixTuning, task: str) -> int:
    """V * 2 * L * k, or the network that writes them, and the head."""
    k, layers = key_width(model), decoder_shape(model)[0]
    if candidate.projection:
        h = candidate.hidden_size or k
        own = candidate.virtual_tokens * k + (k * h + h) + (h * 2 * layers * k + 2 * layers * k)
    else:
        own = candidate.virtual_tokens * 2 * layers * k
    return own + head_parameters(model, task)


def shipped_parameters(model: PreTrainedModel, candidate: PrefixTuning, task: str) -> int:
    """V * 2 * L * k, and the head."""
    own = candidate.virtual_tokens * 2 * decoder_shape(model)[0] * key_width(model)
    return own + head_parameters(model, task)


def key_width(model: PreTrainedModel) -> int:
    """Heads of keys times their width, in each layer."""
    _, heads, width = decoder_shape(model)
    return heads * width


METHOD = Method(
    name="prefix_tuning",
    paper="arXiv:2101.00190",
    family="additive",
    merges=False,
    tasks=("causal-lm", "seq2seq", "sequence-classification"),
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    decays=lambda name: "prompt_encoder." not in name,
    course=soft.SoftCourse,
    ships=shipped_parameters,
)
