"""The lean pass is the model's own, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.speculate.decode import Row, Writer
from tasks.speculate.lean import is_kin
from tasks.speculate.parts import parts_of
from tasks.speculate.tree import Tree

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 24},
}


def made(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Two layers, four heads on two of keys and values, weights far from their start: norms of 1
    and biases of 0 would hide themselves."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **{**KINDS.get(kind, {}), **more},
    )
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model.to(dtype).eval().requires_grad_(False)


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]
TREE = Tree(
    torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]]),
    torch.tensor([[0, 0, 1, 0], [0, 0, 0, 2]]),
    torch.tensor([[0, 1, 2, 1], [0, 1, 1, 2]]),
    torch.ones(2, 4),
    2,
)


def both(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """x of a tree's nodes: by the lean pass, and by the model's own layers."""
    parts = parts_of(model)
    writer, other = Writer(parts), Writer(parts)
    lean = writer.read_tree(prompts, TREE)
    assert writer.lean is not None
    # A hook, and nothing is taken to be what it was.
    hook = parts.layers.layers[0].mlp.register_forward_hook(lambda *of: None)
    own = other.read_tree(prompts, TREE)
    hook.remove()
    assert other.lean is None
    return lean, own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """With rows of one length, and of two."""
    model = made(kind, dtype)
    assert any("bias" in name for name, _ in model.named_parameters()) == (kind == "qwen2")
    for prompts in (PROMPTS, [PROMPTS[0]] * 2):
        lean, own = both(model, prompts)
        assert torch.equal(lean, own)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_without_what_fills_up(kind: str) -> None:
    """x at each prompt's end, and the keys and values of all real tokens. In float32: products of
    other numbers of rows, 2e-6 was measured of numbers of about 1."""
    model = made(kind)
    prompts = [PROMPTS[0], PROMPTS[1], [5]]
    writer, other = (Writer(parts_of(model)) for _ in range(2))
    rows = [Row(at, len(prompt), 1) for at, prompt in enumerate(prompts)]
    with torch.inference_mode():
        lean_cache = writer._cache(rows)
        lean = writer._read(lean_cache, prompts)
        assert writer.lean is not None
        own_cache = other._cache(rows)
        other.lean = None
        own = other._read(own_cache, prompts)
    torch.testing.assert_close(lean, own, rtol=1e-4, atol=1e-5)
    for row, prompt in enumerate(prompts):
        real = (slice(None), slice(None), row, slice(None), slice(len(prompt)))
        torch.testing.assert_close(lean_cache.kv[real], own_cache.kv[real], rtol=1e-4, atol=1e-5)


def test_positions_that_are_scaled() -> None:
    """Beyond what the model was trained for, by YaRN: cosines and sines have a factor."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    lean, own = both(made("llama", rope_parameters={"rope_theta": 1e4, **scaled}), PROMPTS)
    assert torch.equal(lean, own)


def test_an_adapter_that_came_later_acts() -> None:
    """The writer was made before it."""
    model = made("llama")
    parts = parts_of(model)
    writer = Writer(parts)
    before = writer.read_tree(PROMPTS, TREE)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    after = writer.read_tree(PROMPTS, TREE)
    assert writer.lean is not None
    assert not torch.equal(before, after)
    lean, own = both(adapted, PROMPTS)
    assert torch.equal(lean, own)
    assert torch.equal(lean, after)


def test_norms_that_are_tuned_and_vectors_in_layers() -> None:
    """PEFT puts a layer of its own around a norm, which is then no norm of Llama's; IA3's stand
    where products are, and act."""
    for name in ("input_layernorm", "model.norm"):
        tuned = get_peft_model(made("llama"), LNTuningConfig(target_modules=[name]))
        assert not is_kin(tuned.get_base_model().model)
    vectors = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    adapted = get_peft_model(made("llama"), vectors)
    for name, weight in adapted.named_parameters():
        if "ia3_l" in name:
            weight.data.normal_()
    lean, own = both(adapted, PROMPTS)
    assert torch.equal(lean, own)


def test_who_is_no_kin() -> None:
    """Another kind of layer, eager attention, a layer that is wrapped or hooked."""
    assert is_kin(made("llama").model)
    assert not is_kin(made("llama", attn_implementation="eager").model)
    gpt2 = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=61)
    assert not is_kin(AutoModelForCausalLM.from_config(gpt2).transformer)
    assert not is_kin(made("gemma", head_dim=16).model)
    wrapped = made("llama").model
    wrapped.layers[1].mlp = torch.nn.Sequential(wrapped.layers[1].mlp)
    assert not is_kin(wrapped)
    hooked = made("llama").model
    hooked.layers[0].self_attn.register_forward_pre_hook(lambda *of: None)
    assert not is_kin(hooked)
    taken = made("llama").model
    taken.layers[1].mlp.forward = lambda x: x
    assert not is_kin(taken)
