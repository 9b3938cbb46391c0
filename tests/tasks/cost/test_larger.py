"""A base so many times as large: of the same kind, and of about so many parameters."""

from __future__ import annotations

import pytest
from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    ViTConfig,
)

from tasks.cost.larger import larger
from tasks.cost.shapes import base_on_meta
from tasks.methods.method import count_parameters

CONFIGS = {
    "llama": LlamaConfig(num_key_value_heads=8, num_hidden_layers=8),
    # Embeddings are most of it, and are tied to the head.
    "qwen3": Qwen3Config(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(),
    "opt": OPTConfig(),
    "bert": BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6),
    "distilbert": DistilBertConfig(),
    "vit": ViTConfig(num_hidden_layers=4),
}
#: Of those that are no language models.
TASKS = {
    "bert": "sequence-classification",
    "distilbert": "sequence-classification",
    "vit": "image-classification",
}


@pytest.mark.parametrize("times", [3.0, 10.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_larger_base_has_as_many_parameters(name: str, times: float) -> None:
    """Whole heads and whole blocks come within a tenth of what is asked for."""
    config = CONFIGS[name]
    task = TASKS.get(name, "causal-lm")
    width = config.hidden_size
    grown = larger(config, task, "bfloat16", times)
    assert config.hidden_size == width
    own, found = (
        count_parameters(base_on_meta(each, task, "bfloat16")) for each in (config, grown)
    )
    assert found / own == pytest.approx(times, rel=0.1)
    assert grown.hidden_size > config.hidden_size
    assert grown.num_hidden_layers > config.num_hidden_layers
    # As a family grows: heads of the same width, in the same groups, in whole packed blocks.
    assert grown.hidden_size * config.num_attention_heads == (
        config.hidden_size * grown.num_attention_heads
    )
    assert grown.hidden_size % 64 == 0
    assert getattr(grown, "vocab_size", None) == getattr(config, "vocab_size", None)
    if (keys := getattr(config, "num_key_value_heads", None)) is not None:
        assert grown.num_key_value_heads * config.num_attention_heads == (
            keys * grown.num_attention_heads
        )
