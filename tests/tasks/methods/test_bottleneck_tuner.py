"""Bottleneck adapters start at the base, compute their formula, and behave as PEFT's own tuners."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tasks.methods.tuners.bottleneck import (
    PLACEMENTS,
    BottleneckConfig,
    BottleneckLayer,
    count,
    target_widths,
)

D, LAYERS, REDUCTION = 32, 2, 8
SHAPE = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=32)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SHAPE)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=D,
            d_kv=8,
            d_ff=48,
            num_layers=LAYERS,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE, image_size=8, patch_size=4)),
}
GENERATING = {"llama": "CAUSAL_LM", "qwen2": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
#: Each block: its name, the attention's last linear layer, the feed-forward's first and its last.
SPLIT = ("attention.output.dense", "intermediate.dense", "output.dense")
GATED = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
PARTS = {
    "llama": [("model.layers", *GATED)],
    "qwen2": [("model.layers", *GATED)],
    "gpt2": [("transformer.h", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")],
    "bert": [("bert.encoder.layer", *SPLIT)],
    "roberta": [("roberta.encoder.layer", *SPLIT)],
    "t5": [
        (f"{side}.block", "layer.0.SelfAttention.o", f"{feed}.wi", f"{feed}.wo")
        for side, feed in (
            ("encoder", "layer.1.DenseReluDense"),
            ("decoder", "layer.2.DenseReluDense"),
        )
    ],
    "vit": [("vit.layers", "attention.o_proj", "mlp.fc1", "mlp.fc2")],
}
#: The norm over the feed-forward's residual sum, where there is one.
NORMS = {"bert": "output.LayerNorm", "roberta": "output.LayerNorm"}
ACTIVATIONS = {
    "double_sequential": "silu",
    "sequential": "relu",
    "sequential_normed": "silu",
    "parallel": "gelu",
}
SLOW = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}

every_base = pytest.mark.parametrize("name", BASES)
#: Of any base; the one around a norm is for post-norm blocks.
every_placement = pytest.mark.parametrize(
    "placement", [placement for placement in PLACEMENTS if placement != "sequential_normed"]
)
every_case = pytest.mark.parametrize(
    ("name", "placement"),
    [
        (name, placement)
        for name in BASES
        for placement in PLACEMENTS
        if placement != "sequential_normed" or name in NORMS
    ],
)


def made(name: str) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return BASES[name]().eval()


def config_of(placement: str, **more) -> BottleneckConfig:
    scaling = 4.0 if placement == "parallel" else 1.5
    settings = {"activation": ACTIVATIONS[placement], "scaling": scaling} | more
    return BottleneckConfig(placement=placement, reduction_factor=REDUCTION, **settings)


def inputs(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        pixels = torch.randn(2, 3, 8, 8, generator=draw)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    # From 3 on: RoBERTa's 1 is padding.
    ids = torch.randint(3, 64, (2, 9), generator=draw)
    labels = torch.tensor([0, 1]) if name in ("bert", "roberta") else ids
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def logits(model: nn.Module, name: str) -> torch.Tensor:
    return model(**inputs(name)).logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {key: weight for key, weight in model.named_parameters() if weight.requires_grad}


@torch.no_grad()
def shake(model: nn.Module, seed: int = 2) -> nn.Module:
    """Move every trained weight, so that nothing is zero by its start."""
    draw = torch.Generator().manual_seed(seed)
    for weight in trained(model).values():
        weight.add_(0.3 * torch.randn(weight.shape, generator=draw).to(weight.dtype))
    return model


def tuned(name: str, placement: str, **more) -> nn.Module:
    return shake(get_peft_model(made(name), config_of(placement, **more)).eval())


def far(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Apart by more than rounding could: logits here are 0.1 to 1 in size."""
    return (one - other).abs().max().item() > 1e-3


@every_case
def test_the_trained_weights_are_those_of_the_formula(name, placement):
    # By hand, D = 32 and b = 4: 2 * 32 * 4 + 4 + 32 = 292 an adapter. T5 has two stacks.
    blocks = LAYERS * len(PARTS[name])
    expected = 292 * blocks * (2 if placement == "double_sequential" else 1)
    with torch.device("meta"):
        widths = target_widths(BASES[name](), config_of(placement))
    assert count(widths.values(), REDUCTION) == expected
    weights = trained(get_peft_model(made(name), config_of(placement)))
    assert sum(weight.numel() for weight in weights.values()) == expected
    assert all("bottleneck_" in key for key in weights)


def test_a_bottleneck_is_at_least_one_wide():
    assert count([8], 100) == 2 * 8 + 1 + 8


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_at_the_base_bitwise(name, placement, dtype):
    base = made(name).to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    with torch.no_grad():
        before = base(**batch).logits
        model = get_peft_model(base, config_of(placement)).eval()
        after = model(**batch).logits
    assert after.dtype == dtype
    assert torch.equal(before, after)
    assert all(weight.dtype == torch.float32 for weight in trained(model).values())


@every_case
def test_steps_move_the_output_and_leave_the_base_alone(name, placement):
    base_logits = logits(made(name), name)
    model = get_peft_model(made(name), config_of(placement))
    frozen = {k: w.clone() for k, w in model.state_dict().items() if "bottleneck_" not in k}
    optimiser = torch.optim.Adam(trained(model).values(), lr=5e-2)
    for _ in range(3):
        model.train()(**inputs(name)).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert far(logits(model.eval(), name), base_logits)
    state = model.state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in frozen.items())
    with model.disable_adapter():
        assert torch.equal(logits(model, name), base_logits)


def slow_logits(name: str, placement: str, model: nn.Module) -> torch.Tensor:
    """The formula by hooks on a plain base, at the linear layers, with the model's weights."""
    base, state, config = made(name), model.state_dict(), model.peft_config["default"]
    read: dict[str, torch.Tensor] = {}

    def update(key: str, x: torch.Tensor) -> torch.Tensor:
        down, up = key, key.replace("bottleneck_down", "bottleneck_up")
        narrow = F.linear(x, state[down + "weight"], state[down + "bias"])
        narrow = SLOW[ACTIVATIONS[placement]](narrow)
        return config.scaling * F.linear(narrow, state[up + "weight"], state[up + "bias"])

    for stack, attention, first, last in PARTS[name]:
        for i in range(LAYERS):
            block = f"{stack}.{i}"
            here = sorted(
                key.removesuffix("weight")
                for key in state
                if f".{block}." in key and key.endswith("bottleneck_down.default.weight")
            )
            of_attention = [key for key in here if f".{block}.{attention}." in key]
            [of_feed_forward] = [key for key in here if key not in of_attention]
            first_module = base.get_submodule(f"{block}.{first}")
            last_module = base.get_submodule(f"{block}.{last}")
            if placement == "parallel":
                first_module.register_forward_pre_hook(
                    lambda _, args, block=block: read.update({block: args[0]})
                )
                last_module.register_forward_hook(
                    lambda _, args, h, key=of_feed_forward, block=block: (
                        h + update(key, read[block])
                    )
                )
            elif placement == "sequential_normed":
                base.get_submodule(f"{block}.{NORMS[name]}").register_forward_hook(
                    lambda norm, args, y, key=of_feed_forward: F.layer_norm(
                        args[0] + update(key, y), (D,), norm.weight, norm.bias, norm.eps
                    )
                )
            else:
                last_module.register_forward_hook(
                    lambda _, args, h, key=of_feed_forward: h + update(key, h)
                )
            assert len(of_attention) == (placement == "double_sequential")
            for attention_key in of_attention:
                base.get_submodule(f"{block}.{attention}").register_forward_hook(
                    lambda _, args, h, key=attention_key: h + update(key, h)
                )
    return logits(base, name)


@every_case
def test_it_computes_the_formula(name, placement):
    model = tuned(name, placement)
    # The same float32 products. Only BERT's parallel update is added to the residual first, here
    # to the feed-forward: a rounding of numbers near 1, 6e-8 each, in two blocks.
    torch.testing.assert_close(
        logits(model, name), slow_logits(name, placement, model), atol=1e-6, rtol=1e-6
    )
    assert far(logits(model, name), logits(made(name), name))


@every_case
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_reloads_bitwise(tmp_path, name, placement, low_cpu_mem_usage):
    model = tuned(name, placement)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(weight.numel() for weight in saved.values()) == count(
        target_widths(made(name), config_of(placement)).values(), REDUCTION
    )
    assert all(".bottleneck_" in key and ".default." not in key for key in saved)
    # Under another name, so that the name is really taken out and put in.
    again = PeftModel.from_pretrained(
        made(name), tmp_path, adapter_name="other", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert isinstance(again.peft_config["other"], BottleneckConfig)
    assert not trained(again)
    assert torch.equal(logits(again.eval(), name), logits(model, name))


def test_float32_weights_on_a_bfloat16_base_reload_bitwise(tmp_path):
    model = shake(get_peft_model(made("llama").bfloat16(), config_of("sequential")).eval())
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(
            made("llama").bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        for key, weight in trained(model).items():
            assert torch.equal(again.get_parameter(key), weight)


@every_placement
def test_adapters_are_where_and_what_the_base_is(placement):
    # A whole feed-forward has no `weight` that says so. Meta stands for any device but the CPU.
    base = made("llama").bfloat16().to("meta")
    model = get_peft_model(base, config_of(placement), autocast_adapter_dtype=False)
    for weight in trained(model).values():
        assert weight.device.type == "meta"
        assert weight.dtype == torch.bfloat16


def test_a_head_is_trained_and_saved_with_it(tmp_path):
    config = config_of("double_sequential", task_type="SEQ_CLS")
    model = shake(get_peft_model(made("bert"), config).eval())
    heads = [key for key in trained(model) if "classifier" in key]
    assert len(heads) == 2
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key for key in saved if "bottleneck_" not in key} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    again = PeftModel.from_pretrained(made("bert"), tmp_path).eval()
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))
    with model.disable_adapter():
        assert torch.equal(logits(model, "bert"), logits(made("bert"), "bert"))


def copy_adapter(source: nn.Module, model: nn.Module, adapter: str) -> None:
    """The weights of the only adapter of `source` into that of `model` which learns."""
    weights = dict(source.named_parameters())
    with torch.no_grad():
        for key, weight in trained(model).items():
            weight.copy_(weights[key.replace(f".{adapter}.", ".default.")])


@every_base
def test_several_adapters_in_one_model(name):
    def second() -> BottleneckConfig:
        return BottleneckConfig(placement="sequential", reduction_factor=4, activation="gelu")

    first_alone = logits(tuned(name, "double_sequential"), name)
    source = shake(get_peft_model(made(name), second()).eval(), seed=3)
    second_alone = logits(source, name)

    model = tuned(name, "double_sequential")
    model.add_adapter("second", second())
    assert all(".default." in key for key in trained(model))
    assert torch.equal(logits(model, name), first_alone)
    model.set_adapter("second")
    assert all(".second." in key for key in trained(model))
    copy_adapter(source, model, "second")
    assert torch.equal(logits(model, name), second_alone)
    model.set_adapter("default")
    assert torch.equal(logits(model, name), first_alone)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(made(name), name))
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert not any(".default." in key for key in model.state_dict())
    assert torch.equal(logits(model, name), second_alone)


def test_a_parallel_and_a_sequential_adapter_of_one_module():
    source = tuned("llama", "parallel")
    model = get_peft_model(made("llama"), config_of("sequential")).eval()
    model.add_adapter("beside", config_of("parallel"))
    model.set_adapter("beside")
    copy_adapter(source, model, "beside")
    assert torch.equal(logits(model, "llama"), logits(source, "llama"))
    # Both at once: the sequential one is still zero, so it adds nothing.
    model.base_model.set_adapter(["default", "beside"])
    assert torch.equal(logits(model, "llama"), logits(source, "llama"))
    shake(model)
    assert far(logits(model, "llama"), logits(source, "llama"))


@pytest.mark.parametrize(
    "order",
    [
        ("sequential", "parallel"),
        ("parallel", "sequential"),
        ("parallel", "sequential_normed"),
    ],
)
def test_adapters_inside_each_other_are_refused_and_nothing_changes(order):
    # BERT's sequential adapters are in output, at its dense layer or its norm; its parallel ones
    # are at output itself.
    model = tuned("bert", order[0])
    before, keys = logits(model, "bert"), list(model.state_dict())
    with pytest.raises(ValueError, match=r"lies inside .*a model each"):
        model.add_adapter("second", config_of(order[1]))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, "bert"), before)


@every_case
def test_it_does_not_merge_but_unloads(name, placement):
    model = tuned(name, placement)
    before = logits(model, name)
    for merge in (model.merge_adapter, model.merge_and_unload, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=r"do not merge.*serve them unmerged"):
            merge()
    assert torch.equal(logits(model, name), before)
    plain = model.unload()
    assert not any(isinstance(module, BottleneckLayer) for module in plain.modules())
    assert torch.equal(logits(plain, name), logits(made(name), name))


@pytest.mark.parametrize("name", GENERATING)
@every_placement
def test_it_generates_the_same_with_and_without_a_cache(name, placement):
    model = tuned(name, placement, task_type=GENERATING[name])
    ids = inputs(name)["input_ids"]
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, use_cache=True, **settings)
    # After the prompt, or T5's one token to start from.
    assert cached.shape == (2, 9 if name == "t5" else 17)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))
    base = made(name).generate(input_ids=ids, **settings)
    assert not torch.equal(cached, base)


@pytest.mark.parametrize("reentrant", [False, True])
@every_case
def test_checkpointing_gives_the_same_gradients(name, placement, reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = made(name)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = shake(get_peft_model(base, config_of(placement))).train()
        # The same dropout in both.
        torch.manual_seed(4)
        model(**inputs(name)).loss.backward()
        gradients.append({key: weight.grad for key, weight in trained(model).items()})
    plain, recomputed = gradients
    # The same products in the same order; but what T5's decoder blocks hand back to its encoder
    # adds up in another: a few roundings of gradients near 0.1, 7e-9 each.
    rounding = 1e-7 if name == "t5" else 0
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, rtol=0, atol=rounding)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())


@every_case
def test_the_state_dict_makes_the_round(name, placement):
    model, other = tuned(name, placement), get_peft_model(made(name), config_of(placement)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, name), logits(model, name))
    other = get_peft_model(made(name), config_of(placement)).eval()
    assert not set_peft_model_state_dict(other, get_peft_model_state_dict(model)).unexpected_keys
    assert torch.equal(logits(other, name), logits(model, name))
    assert torch.equal(logits(copy.deepcopy(model), name), logits(model, name))


@every_case
def test_the_last_adapter_deleted_leaves_the_base(name, placement):
    model = tuned(name, placement)
    model.delete_adapter("default")
    # PEFT's own wrapper still looks for the adapter that it deleted.
    assert torch.equal(logits(model.base_model.model, name), logits(made(name), name))


@every_case
def test_mixed_precision(name, placement):
    model = tuned(name, placement)
    exact = logits(model, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs(name))
        base = logits(made(name), name)
        with model.disable_adapter():
            assert torch.equal(logits(model, name), base)
    output.loss.backward()
    for weight in trained(model).values():
        assert weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all()
    # bfloat16 keeps 8 bits: 0.4 % a product, which two blocks of them add up to a few per cent of
    # the largest logit.
    assert (output.logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
