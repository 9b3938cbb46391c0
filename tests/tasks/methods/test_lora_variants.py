"""LoRA's variants: their counts and scalings, where they start, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import Lora
from schemas.errors import UserError
from schemas.recipe import Train
from tasks.methods.lora import METHOD
from tasks.methods.method import trained
from tasks.train.loop import make_optimizer


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def lora(**given) -> Lora:
    return Lora(method="lora", rank=4, alpha=8, target_modules=["q_proj", "down_proj"], **given)


def built(**given) -> nn.Module:
    return METHOD.build(base(), lora(**given), "causal-lm")


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {
        name.rsplit(".", 1)[-1]: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
    }


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 2 * 4 * (64 + 80)),
        ({"rslora": True}, 2 * 4 * (64 + 80)),
        ({"ranks": {"down_proj": 7}}, 2 * (4 * 64 + 7 * 80)),
        # Each of the 32 outputs of either layer has a length.
        ({"dora": True}, 2 * (4 * (64 + 80) + 32 + 32)),
    ],
)
def test_each_variant_trains_what_it_says(given, count):
    weights = trained(built(**given))
    assert sum(weight.numel() for weight in weights.values()) == count
    assert METHOD.trainable_parameters(base(), lora(**given), "causal-lm") == count


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    plain, rs = layers(built()), layers(built(rslora=True, ranks={"down_proj": 16}))
    assert plain["q_proj"].scaling["default"] == 8 / 4
    assert rs["q_proj"].scaling["default"] == 8 / math.sqrt(4)
    assert rs["down_proj"].scaling["default"] == 8 / math.sqrt(16)


@pytest.mark.parametrize("given", [{"rslora": True}, {"ranks": {"q_proj": 2}}, {"dora": True}])
def test_each_variant_starts_at_the_base(given):
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        before = base()(input_ids=ids).logits
        after = built(**given)(input_ids=ids).logits
    # DoRA divides each row by its length and multiplies with it: one float32 rounding each.
    assert torch.allclose(before, after, atol=1e-6 if "dora" in given else 0.0, rtol=0)


def test_dora_is_the_sum_at_the_length_that_it_learned():
    model = built(dora=True)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1 * torch.randn_like(weight))
    layer = layers(model)["q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    lengths = layer.lora_magnitude_vector["default"].weight
    summed = layer.base_layer.weight + 2.0 * b @ a
    expected = lengths[:, None] * summed / summed.norm(dim=1, keepdim=True)
    x = torch.randn(5, 32)
    # float32 sums of 32 terms in another order.
    assert torch.allclose(layer(x), x @ expected.T, atol=1e-5)


def test_lora_plus_gives_b_its_own_rate():
    """AdamW's first step is the rate itself, whatever the gradient: here B's is 16 times A's."""
    model, candidate = built(b_rate=16.0), lora(b_rate=16.0)
    weights = trained(model)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.1 * torch.randn_like(weight))
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    settings = Train(learning_rate=1e-3)
    optimizer = make_optimizer(weights, settings, lambda name: METHOD.rate_of(candidate, name))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * group["times"]
    ids = torch.arange(3, 12)[None]
    (100 * model(input_ids=ids, labels=ids).loss).backward()
    optimizer.step()
    for name, weight in weights.items():
        moved = (weight - before[name]).abs().median().item()
        assert moved == pytest.approx(16e-3 if "lora_B" in name else 1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks": {"k_proj": 2}}, r"ranks: k_proj is none .*[\s\S]*choose from down_proj, q_proj"),
        ({"ranks": {"q_proj": 33}}, r"33, but q_proj of this base are only 32 wide"),
    ],
)
def test_ranks_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        built(**given)


def test_names_tell_variants_apart():
    names = {
        lora(**given).label for given in ({}, {"rslora": True}, {"dora": True}, {"b_rate": 16})
    }
    assert names == {"lora-r4", "lora-r4-rs", "lora-r4-dora", "lora-r4-plus"}
