"""Prefix tuning: the keys and values of V virtual tokens are learned, in every layer.

Li & Liang 2021, arXiv:2101.00190. With L layers and k the width of a layer's keys (heads of keys
times their width), it trains V * 2 * L * k weights; with `projection` V * k embeddings and two
linear layers, k to h to 2 * L * k, of which only what comes out is kept. For classification the
head learns too.
"""

from __future__ import annotations

from peft import PrefixTuningConfig, PromptLearningConfig
from transformers import PreTrainedModel

from schemas.candidates import PrefixTuning
from tasks.methods import soft
from tasks.methods.method import Method, head_parameters


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
        token_dim=model.config.hidden_size,
        prefix_projection=candidate.projection,
        encoder_hidden_size=candidate.hidden_size,
        needs_cache=True,
    )


def trainable_parameters(model: PreTrainedModel, candidate: PrefixTuning, task: str) -> int:
    """V * 2 * L * k, or the network that writes them, and the head."""
    k, layers = key_width(model), model.config.num_hidden_layers
    if candidate.projection:
        h = candidate.hidden_size or k
        own = candidate.virtual_tokens * k + (k * h + h) + (h * 2 * layers * k + 2 * layers * k)
    else:
        own = candidate.virtual_tokens * 2 * layers * k
    return int(own) + head_parameters(model, task)


def shipped_parameters(model: PreTrainedModel, candidate: PrefixTuning, task: str) -> int:
    """V * 2 * L * k, and the head."""
    own = candidate.virtual_tokens * 2 * model.config.num_hidden_layers * key_width(model)
    return int(own) + head_parameters(model, task)


def key_width(model: PreTrainedModel) -> int:
    """Heads of keys times their width, in each layer."""
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * width)


METHOD = Method(
    name="prefix_tuning",
    paper="arXiv:2101.00190",
    family="additive",
    merges=False,
    tasks=("causal-lm", "sequence-classification"),
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    decays=lambda name: "prompt_encoder." not in name,
    course=soft.SoftCourse,
    ships=shipped_parameters,
)
