"""The top blocks, wherever a kind of model keeps them: which learn, and that they reload."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
    ViTForImageClassification,
)

from schemas.candidates import LastLayers
from schemas.errors import UserError
from tasks.methods.last_layers import METHOD, top_layers
from tasks.methods.method import trained
from tasks.train.output import save_model

CAUSAL, TEXTS = "causal-lm", "sequence-classification"
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIGS: dict[str, tuple[str, PretrainedConfig, str, str | None]] = {
    "llama": (CAUSAL, LlamaConfig(**LLAMA), "model.layers", "model.norm"),
    "qwen2": (
        CAUSAL,
        Qwen2Config(**LLAMA, num_key_value_heads=2),
        "model.layers",
        "model.norm",
    ),
    "gpt2": (
        CAUSAL,
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4),
        "transformer.h",
        "transformer.ln_f",
    ),
    "bert": (TEXTS, BertConfig(**LLAMA), "bert.encoder.layer", None),
    "roberta": (TEXTS, RobertaConfig(**LLAMA), "roberta.encoder.layer", None),
    "distilbert": (
        TEXTS,
        DistilBertConfig(vocab_size=64, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
        "distilbert.transformer.layer",
        None,
    ),
    "t5": (
        TEXTS,
        T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "transformer.decoder.block",
        "transformer.decoder.final_layer_norm",
    ),
}
CLASSES = {CAUSAL: AutoModelForCausalLM, TEXTS: AutoModelForSequenceClassification}


def make(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    task, config, _, _ = CONFIGS[kind]
    return CLASSES[task].from_config(config).to(dtype).eval(), task


def last(layers: int) -> LastLayers:
    return LastLayers(method="last_layers", layers=layers)


def row() -> torch.Tensor:
    # T5 reads the text's end for its class.
    return torch.tensor([[5, 9, 14, 3, 22, 1]])


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layers", [1, 3])
def test_all_of_the_top_blocks_and_the_final_norm_learn_and_no_more(kind, layers):
    """Names are read off the plain model: whatever lies in the last blocks."""
    model, task = make(kind)
    _, _, blocks, norm = CONFIGS[kind]
    inside = [f"{blocks}.{number}." for number in range(3 - layers, 3)]
    inside += [] if norm is None else [f"{norm}."]
    expected = {
        name: weight for name, weight in model.named_parameters() if name.startswith(tuple(inside))
    }
    counted = METHOD.trainable_parameters(model, last(layers), task)
    learns = {
        name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", "")
        for name in trained(METHOD.build(model, last(layers), task))
        if "modules_to_save" not in name
    }
    assert learns == expected.keys()
    heads = 0 if task == CAUSAL else METHOD.trainable_parameters(make(kind)[0], last(1), task)
    heads -= 0 if task == CAUSAL else weights_of(top_layers(make(kind)[0], last(1)))
    assert counted == sum(weight.numel() for weight in expected.values()) + heads


def weights_of(layers: dict[str, nn.Module]) -> int:
    return sum(weight.numel() for layer in layers.values() for weight in layer.parameters())


def test_a_vision_model_has_such_blocks_too():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
    )
    chosen = top_layers(ViTForImageClassification(config), last(1))
    blocks = {name.split(".")[2] for name in chosen if name.startswith("vit.layers.")}
    assert blocks == {"2"}
    assert "vit.layernorm" in chosen


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_at_the_base_goes_back_to_it_and_reloads(tmp_path, kind, dtype):
    """Disabled it is the base bit for bit. What is saved is rounded to the base's dtype, once, so
    a reload is that model bit for bit, and as small as its weights are in that dtype."""
    base, task = make(kind, dtype)
    plain = base(input_ids=row()).logits.detach()
    model = METHOD.build(base, last(1), task).eval()
    if dtype == torch.float32:
        assert torch.equal(model(input_ids=row()).logits, plain)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        with model.disable_adapter():
            assert torch.equal(model(input_ids=row()).logits, plain)
        count = sum(weight.numel() for weight in trained(model).values())
        name = "float32" if dtype == torch.float32 else "bfloat16"
        save_model(model, tmp_path / "model", tmp_path, name, METHOD)
        tuned = model(input_ids=row()).logits
        again = PeftModel.from_pretrained(make(kind, dtype)[0], tmp_path / "model").eval()
        assert torch.equal(again(input_ids=row()).logits, tuned)
        assert torch.equal(again.merge_and_unload()(input_ids=row()).logits, tuned)
    assert not torch.allclose(tuned, plain, atol=1e-2)
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {dtype}
    assert sum(weight.numel() for weight in saved.values()) == count


def test_more_blocks_than_there_are_is_refused():
    model, task = make("llama")
    for act in (METHOD.trainable_parameters, METHOD.build):
        with pytest.raises(UserError, match=r"layers[\s\S]*4, but this base has 3[\s\S]*at most 3"):
            act(model, last(4), task)


def test_weights_beside_the_layers_of_a_block_are_refused():
    model, task = make("llama")
    model.model.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(UserError, match=r"layers\.2\.self_attn holds weights .*sinks"):
        METHOD.build(model, last(1), task)
    METHOD.build(make("llama")[0], last(1), task)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no list of blocks"):
        METHOD.trainable_parameters(nn.Sequential(nn.Linear(2, 2)), last(1), CAUSAL)
