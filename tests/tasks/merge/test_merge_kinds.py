"""Folding what is no low-rank update: scales, norms and biases, against PEFT's own merge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from schemas.errors import StageError
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from tasks.merge.stage import run
from tasks.methods.tuners.bitfit import BitFitConfig
from tasks.methods.tuners.bottleneck import BottleneckConfig

LLAMA = {
    "ia3": (
        IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias", "down_proj.weight"),
    ),
    "layer_norm": (
        LNTuningConfig(target_modules=["input_layernorm", "norm"]),
        ("input_layernorm.weight", "model.norm.weight"),
    ),
    "last_layers": (
        LNTuningConfig(target_modules=["model.layers.1.self_attn.q_proj", "model.norm"]),
        ("1.self_attn.q_proj.weight", "1.self_attn.q_proj.bias", "model.norm.weight"),
    ),
    "bitfit": (BitFitConfig(), ("bias",)),
    "dora": (LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), ("q_proj.weight",)),
    "rslora": (
        LoraConfig(
            r=4, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 7}
        ),
        ("q_proj.weight", "up_proj.weight"),
    ),
}
GPT2 = {
    "ia3": (
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
        ("c_attn.weight", "c_attn.bias", "mlp.c_proj.weight"),
    ),
    "layer_norm": (
        LNTuningConfig(target_modules=["ln_1", "ln_f"]),
        ("ln_1.weight", "ln_1.bias", "ln_f.weight", "ln_f.bias"),
    ),
    "last_layers": (
        LNTuningConfig(target_modules=["transformer.h.1.attn.c_attn"]),
        ("h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"),
    ),
    "bitfit": (BitFitConfig(), ("bias",)),
}
CASES = [("llama", name, *LLAMA[name]) for name in LLAMA] + [
    ("gpt2", name, *GPT2[name]) for name in GPT2
]


def make_base(kind: str, directory: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
        )
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    for name, weight in model.named_parameters():
        # Zero, as they are made, biases would hide whether they are scaled too.
        if name.endswith(".bias"):
            weight.data.normal_()
    model.to(dtype).save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def load(base: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


@pytest.mark.parametrize(("kind", "name", "config", "ends"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_pefts_own_merge(tmp_path, kind, name, config, ends, dtype):
    """One rounding apart at most, and different from the base in what the method trains alone."""
    base = make_base(kind, tmp_path / "base", dtype)
    settings = dataclasses.replace(config, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(base, dtype), settings)
    generator = torch.Generator().manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = weight.data.float() + 0.3 * noise
    adapted.save_pretrained(tmp_path / "trained" / "model")
    (tmp_path / "out").mkdir()
    paths = {"base": base, "trained": tmp_path / "trained"}
    run(MergeSpec(finish=Finish(merge=True)), paths, tmp_path / "out")

    merged = PeftModel.from_pretrained(load(base, dtype), tmp_path / "trained" / "model")
    theirs = merged.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert ours.keys() == before.keys()
    changed = {name for name, weight in ours.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.endswith(ends)}
    for tensor, weight in ours.items():
        assert weight.dtype == dtype
        # Two roundings of the same float32 value fall on neighbours at most, and PEFT rounds the
        # vector or the update that it folds to the base's dtype first: once more, of the size of
        # the largest weight.
        wanted = theirs[tensor].float()
        bound = torch.finfo(dtype).eps * (2 * wanted.abs() + wanted.abs().max())
        assert ((weight.float() - wanted).abs() <= bound).all(), tensor


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("llama", BottleneckConfig(), "cannot fold .*BOTTLENECK"),
        # A row of Conv1D's weight is an input: its length is not what DoRA learned.
        ("gpt2", LoraConfig(use_dora=True, target_modules=["c_fc"]), "DoRA into .*c_fc"),
    ],
)
def test_what_cannot_be_folded_is_refused(tmp_path, kind, config, words):
    base = make_base(kind, tmp_path / "base", torch.float32)
    settings = dataclasses.replace(config, task_type="CAUSAL_LM")
    adapted = get_peft_model(load(base, torch.float32), settings)
    adapted.save_pretrained(tmp_path / "trained" / "model")
    (tmp_path / "out").mkdir()
    paths = {"base": base, "trained": tmp_path / "trained"}
    with pytest.raises(StageError, match=rf"{words}.*merge: false"):
        run(MergeSpec(finish=Finish(merge=True)), paths, tmp_path / "out")
