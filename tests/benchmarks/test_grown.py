"""A grown model computes what the small one does, whatever its width and depth."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from speculation.grown import grow, sources  # noqa: E402

#: In standard deviations of the logits. The same sums in another order, each float32 operation
#: rounded to 6e-8 and fed through up to seven blocks: 2e-5 is seen. A head or a copy too many
#: changes logits by about 1.
TOLERANCE = 1e-4


def small(**changed: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 112,
        "head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**config, **changed})).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # norms that do something
            weight.data.uniform_(0.5, 1.5)
        assert name
    return model


@pytest.mark.parametrize(("times", "layers"), [(1, 3), (2, 3), (4, 7), (3, 5)])
@torch.inference_mode()
def test_logits_stay(times: int, layers: int) -> None:
    model = small()
    large = grow(model, times, layers).eval()
    assert large.config.num_hidden_layers == layers
    assert large.config.hidden_size == 48 * times
    ids_BT = torch.randint(96, (3, 17), generator=torch.Generator().manual_seed(1))
    own, grown = model(ids_BT).logits, large(ids_BT).logits
    assert own.std() > 0.5
    torch.testing.assert_close(grown / own.std(), own / own.std(), atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_noise_tells_copies_apart_and_wakes_the_new_blocks() -> None:
    large = grow(small(), 2, 5, noise=0.05)
    assert all(bool(layer.mlp.down_proj.weight.any()) for layer in large.model.layers)
    rows = large.model.layers[0].mlp.up_proj.weight.chunk(2)
    assert not torch.equal(rows[0], rows[1])


def test_every_block_works_once() -> None:
    for layers in range(4, 12):
        assert [block for block, works in sources(layers, 4) if works] == [0, 1, 2, 3]


@pytest.mark.parametrize("changed", [{"tie_word_embeddings": False}, {"mlp_bias": True}])
def test_what_cannot_be_grown_is_refused(changed: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="tied embeddings"):
        grow(small(**changed), 2, 3)


def test_layers_are_not_dropped() -> None:
    with pytest.raises(ValueError, match="fewer"):
        grow(small(), 2, 2)
