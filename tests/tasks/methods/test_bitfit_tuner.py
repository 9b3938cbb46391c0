"""BitFit trains the model's own biases alone, starts at the base, and behaves as a PEFT tuner."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
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

from tasks.methods.method import trained
from tasks.methods.tuners.bitfit import BitFitConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {"vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, **SIZES}
ENCODER = {"vocab_size": 64, "num_labels": 5, "max_position_embeddings": 40, **SIZES}
#: Dropout is off, so that two passes over the same weights are comparable.
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BASES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**ENCODER, **QUIET)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER, **QUIET)),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES, **QUIET)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, attention_bias=True)),
}
GENERATING = ("gpt2", "qwen2", "llama")
# Two layers each, 32 wide, 48 in the middle, worked out by hand.
COUNTS = {
    # c_attn 96, attn.c_proj 32, c_fc 128, mlp.c_proj 32, two norms; the last norm.
    "gpt2": 2 * (96 + 32 + 128 + 32 + 2 * 32) + 32,
    # q, k, v, output, two norms, up 48, down 32; the norm of the embeddings, the pooler.
    "bert": 2 * (4 * 32 + 2 * 32 + 48 + 32) + 32 + 32,
    "roberta": 2 * (4 * 32 + 2 * 32 + 48 + 32) + 32,
    # The convolution of the patches, the last norm.
    "vit": 2 * (4 * 32 + 2 * 32 + 48 + 32) + 32 + 32,
    # q 32, k and v 16.
    "qwen2": 2 * (32 + 16 + 16),
    # q, k, v and the output.
    "llama": 2 * (32 + 16 + 16 + 32),
}
# The classifier learns whole: 32 to 5; RoBERTa's has a 32 to 32 layer before.
HEADS = {"bert": 32 * 5 + 5, "roberta": 32 * 32 + 32 + 32 * 5 + 5, "vit": 32 * 5 + 5}


def make_base(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base with biases that are not zero, as those of a trained model are not."""
    torch.manual_seed(0)
    base = BASES[name]()
    with torch.no_grad():
        for key, weight in base.named_parameters():
            if key.endswith("bias"):
                weight.add_(0.1 * torch.randn_like(weight))
            # Not `base.to`: it would round the angles of the rotary embedding, too.
            weight.data = weight.data.to(dtype)
    return base.eval()


def config(name: str, **given) -> BitFitConfig:
    if name in GENERATING:
        return BitFitConfig(task_type="CAUSAL_LM", **given)
    if name == "bert":  # the head is named by PEFT
        return BitFitConfig(task_type="SEQ_CLS", **given)
    return BitFitConfig(modules_to_save=["classifier"], **given)


def tune(name: str, dtype: torch.dtype = torch.float32, **given) -> nn.Module:
    return get_peft_model(make_base(name, dtype), config(name, **given)).eval()


def logits(model: nn.Module, name: str) -> torch.Tensor:
    torch.manual_seed(1)
    dtype = next(model.parameters()).dtype
    if name == "vit":
        return model(pixel_values=torch.randn(2, 3, 8, 8, dtype=dtype)).logits
    return model(input_ids=torch.randint(2, 64, (2, 9))).logits


def learn(model: nn.Module, name: str, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        logits(model, name).float().pow(2).mean().backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("name", BASES)
def test_what_is_trained_is_every_bias_and_the_head(name):
    base = make_base(name)
    biases = {
        key.removesuffix(".bias"): weight.numel()
        for key, weight in base.named_parameters()
        if key.endswith(".bias") and not key.startswith("classifier")
    }
    head = sum(weight.numel() for key, weight in base.named_parameters() if "classifier" in key)
    weights = trained(get_peft_model(base, config(name)))
    assert {key for key in weights if "classifier" not in key} == {
        f"base_model.model.{key}.bitfit_bias.default" for key in biases
    }
    assert sum(biases.values()) == COUNTS[name]
    assert head == HEADS.get(name, 0)
    assert sum(weight.numel() for weight in weights.values()) == COUNTS[name] + head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_it_starts_at_the_base_exactly(name, dtype):
    with torch.no_grad():
        before = logits(make_base(name, dtype), name)
        assert torch.equal(logits(tune(name, dtype), name), before)


@pytest.mark.parametrize("name", BASES)
def test_only_biases_change_and_all_of_them_do(name):
    model = tune(name)
    before, start = values(model), logits(model, name).detach()
    learn(model, name)
    after = values(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # k's bias adds the same to every score of a row, so softmax hides it: its gradient is
    # rounding error, or exactly zero. Llama and Qwen2 rotate k after the bias, which shows it.
    silent = {key for key in trained(model) if ".key." in key}
    assert set(trained(model)) - silent <= changed <= set(trained(model))
    # Three steps of 0.05 each move outputs far past float32's rounding, about 1e-6 here.
    assert not torch.allclose(logits(model, name), start, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_a_saved_adapter_holds_biases_and_head_and_reloads_exactly(tmp_path, name, dtype):
    model = tune(name, dtype)
    learn(model, name)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert all(
        key.endswith(".bitfit_bias") or key.startswith("base_model.model.classifier.")
        for key in held
    )
    assert sum(weight.numel() for weight in held.values()) == COUNTS[name] + HEADS.get(name, 0)
    again = PeftModel.from_pretrained(make_base(name, dtype), tmp_path).eval()
    with torch.no_grad():
        # The same products in the same order.
        assert torch.equal(logits(again, name), logits(model, name))
    assert not trained(again)
    more = PeftModel.from_pretrained(make_base(name, dtype), tmp_path, is_trainable=True)
    assert set(trained(more)) == set(trained(model))


def test_it_loads_through_empty_weights(tmp_path):
    model = tune("gpt2")
    learn(model, "gpt2")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base("gpt2"), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(again, "gpt2"), logits(model, "gpt2"))


@pytest.mark.parametrize("name", BASES)
def test_a_disabled_adapter_is_the_base_exactly(name):
    model = tune(name)
    learn(model, name)
    with torch.no_grad():
        tuned = logits(model, name)
        with model.disable_adapter():
            assert torch.equal(logits(model, name), logits(make_base(name), name))
        assert torch.equal(logits(model, name), tuned)
    assert any("bitfit_bias" in key for key in trained(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_merging_moves_no_output_and_unmerging_restores_the_base(name, dtype):
    model = tune(name, dtype)
    learn(model, name)
    before = values(model)
    with torch.no_grad():
        tuned = logits(model, name)
        model.merge_adapter(safe_merge=True)
        assert torch.equal(logits(model, name), tuned)
        model.unmerge_adapter()
        after = values(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(logits(model, name), tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_merge_and_unload_is_a_plain_model_with_the_same_outputs(tmp_path, name, dtype):
    model = tune(name, dtype)
    learn(model, name)
    tuned = logits(model, name).detach()
    plain = model.merge_and_unload()
    base = make_base(name, dtype)
    assert type(plain) is type(base)
    assert {k: v.dtype for k, v in plain.state_dict().items()} == {
        k: v.dtype for k, v in base.state_dict().items()
    }
    plain.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        assert torch.equal(logits(plain, name), tuned)
        assert torch.equal(logits(again, name), tuned)


@pytest.mark.parametrize("name", BASES)
def test_unloading_gives_the_base_back(name):
    model = tune(name)
    learn(model, name)
    plain, base = model.unload().state_dict(), make_base(name).state_dict()
    assert plain.keys() == base.keys()
    assert all(torch.equal(plain[key], base[key]) for key in base if "classifier" not in key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_a_second_adapter_is_added_set_and_deleted(name, dtype):
    model = tune(name, dtype)
    learn(model, name)
    first, weights = logits(model, name).detach(), set(trained(model))
    model.add_adapter("other", config(name))
    assert set(trained(model)) == weights
    assert torch.equal(logits(model, name), first)
    model.set_adapter("other")
    # A new adapter starts at the base's biases, whatever the first one learnt.
    assert torch.equal(logits(model, name), logits(make_base(name, dtype), name))
    assert {key.replace(".other", ".default") for key in trained(model)} == weights
    learn(model, name, steps=1)
    model.set_adapter("default")
    assert torch.equal(logits(model, name), first)
    model.delete_adapter("other")
    assert not any(".other" in key for key in model.state_dict())
    assert torch.equal(logits(model, name), first)


def test_the_last_adapter_deleted_leaves_the_base():
    model = tune("gpt2")
    learn(model, "gpt2")
    model.delete_adapter("default")
    # PEFT's own wrapper still looks for the adapter that it deleted.
    assert torch.equal(logits(model.base_model.model, "gpt2"), logits(make_base("gpt2"), "gpt2"))


def test_an_adapter_added_while_another_is_merged_starts_at_the_base():
    model = tune("gpt2")
    learn(model, "gpt2")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.add_adapter("other", config("gpt2"))
    model.set_adapter("other")
    assert torch.equal(logits(model, "gpt2"), logits(make_base("gpt2"), "gpt2"))


def test_adapters_of_other_modules_leave_each_other_alone():
    model = tune("bert", target_modules=["query"])
    model.add_adapter("other", BitFitConfig(target_modules=["value"]))
    learn(model, "bert")
    model.set_adapter("other")
    parts = {key.split(".bitfit")[0].rsplit(".", 1)[-1] for key in trained(model) if "bitf" in key}
    assert parts == {"value"}
    model.merge_adapter()
    merged = [key for key, part in model.named_modules() if getattr(part, "merged_adapters", None)]
    assert merged
    assert all(key.endswith("value") for key in merged)


def test_what_is_merged_stands_by_itself_and_is_not_in_the_state():
    model = tune("gpt2")
    learn(model, "gpt2")
    before, keys = logits(model, "gpt2").detach(), set(model.state_dict())
    model.merge_adapter()
    assert set(model.state_dict()) == keys
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(1.0)
    assert torch.equal(logits(model, "gpt2"), before)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert not torch.equal(logits(model, "gpt2"), before)


def test_two_adapters_at_once_are_refused():
    model = tune("gpt2")
    model.add_adapter("other", config("gpt2"))
    with pytest.raises(ValueError, match="cannot be merged together"):
        model.merge_adapter(["default", "other"])
    model.merge_adapter(["default"])
    with (
        pytest.warns(UserWarning, match="additionally merging"),
        pytest.raises(ValueError, match="unmerge it before"),
    ):
        model.merge_adapter(["other"])
    model.unmerge_adapter()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="a module has one bias"):
        logits(model, "gpt2")


def test_a_safe_merge_refuses_what_is_not_finite():
    model = tune("gpt2")
    with torch.no_grad():
        next(iter(trained(model).values()))[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.merge_adapter(safe_merge=True)


def test_disabling_a_merged_adapter_gives_the_base():
    model = tune("gpt2")
    learn(model, "gpt2")
    tuned = logits(model, "gpt2").detach()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, "gpt2"), logits(make_base("gpt2"), "gpt2"))
    assert torch.equal(logits(model, "gpt2"), tuned)


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates(name):
    model = tune(name)
    learn(model, name, steps=8)
    ids = torch.arange(2, 8)[None]
    keep = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(input_ids=ids, **keep)
    assert out.shape == (1, 14)
    # Greedy, so that equal outputs give equal tokens.
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **keep), out)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = make_base(name)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = get_peft_model(base, config(name)).train()
        logits(model, name).pow(2).mean().backward()
        gradients.append({key: weight.grad for key, weight in trained(model).items()})
    assert all(gradient is not None for gradient in gradients[1].values())
    for key, gradient in gradients[0].items():
        # The second pass makes the same products; only the order in which the gradients of a
        # tensor that is used twice add up may differ: a few units of float32's 1.2e-7.
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", BASES)
def test_gradients_are_those_of_the_biases_of_the_base(name):
    base, model = make_base(name), tune(name)
    logits(base, name).pow(2).mean().backward()
    logits(model, name).pow(2).mean().backward()
    own = dict(base.named_parameters())
    for key, weight in trained(model).items():
        if "bitfit_bias" in key:
            plain = key.removeprefix("base_model.model.").replace("bitfit_bias.default", "bias")
            # As above: the base's weights learn, too, which may change the order of the sums.
            torch.testing.assert_close(weight.grad, own[plain].grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", BASES)
def test_mixed_precision_is_that_of_the_base(name):
    base, model = make_base(name), tune(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = logits(model, name)
        assert torch.equal(out, logits(base, name))
        out.float().pow(2).mean().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in trained(model).values())


def test_a_bfloat16_base_trains_in_float32_unless_told_not_to():
    model = tune("gpt2", torch.bfloat16)
    model.add_adapter("other", config("gpt2"))
    biases = {key: weight for key, weight in model.named_parameters() if "bitfit_bias" in key}
    assert all(weight.dtype == torch.float32 for weight in biases.values())
    assert all(weight.requires_grad == (".default" in key) for key, weight in biases.items())
    half = get_peft_model(
        make_base("gpt2", torch.bfloat16), config("gpt2"), autocast_adapter_dtype=False
    )
    assert all(weight.dtype == torch.bfloat16 for weight in trained(half).values())


@pytest.mark.parametrize("name", BASES)
def test_the_state_dict_makes_the_round(name):
    model, other = tune(name), tune(name)
    learn(model, name)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, name), logits(model, name))
    held = get_peft_model_state_dict(model)
    assert sum(weight.numel() for weight in held.values()) == COUNTS[name] + HEADS.get(name, 0)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, name), logits(model, name))


def test_the_output_head_is_left_out_unless_it_is_named():
    def bert():
        return BertForMaskedLM(BertConfig(**ENCODER))

    weights = trained(get_peft_model(bert(), BitFitConfig()))
    # The head is the decoder to the vocabulary; the layer before it is the model's own.
    assert not any("decoder" in key for key in weights)
    assert any("predictions.transform.dense" in key for key in weights)
    with pytest.raises(ValueError, match=r"are one bias[\s\S]*put cls.predictions.decoder"):
        get_peft_model(bert(), BitFitConfig(target_modules=["decoder"]))


def test_targets_and_exclusions_are_endings_or_expressions():
    def parts(**given):
        weights = trained(get_peft_model(make_base("bert"), BitFitConfig(**given)))
        return {key.removeprefix("base_model.model.").split(".bitfit")[0] for key in weights}

    queries = {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    assert parts(target_modules=["query"]) == queries
    assert parts(target_modules=r".*\.query") == queries
    everything = parts()
    assert parts(exclude_modules=["query"]) == everything - queries
    assert parts(exclude_modules=r".*\.query") == everything - queries


@pytest.mark.parametrize("given", [["wq"], ["query", "wq"], "wq", ["dropout"], ["classifier"], []])
def test_a_target_without_a_bias_is_refused_with_those_that_have_one(given):
    with pytest.raises(ValueError, match=r"choose from LayerNorm, classifier, dense, key, query"):
        tune("bert", target_modules=given)


def test_a_refused_second_adapter_leaves_the_model_as_it_was():
    model = tune("bert")
    before = values(model)
    with pytest.raises(ValueError, match="wq matches no module"):
        model.add_adapter("other", config("bert", target_modules=["wq"]))
    after = values(model)
    assert before.keys() == after.keys()
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "base",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        ),
    ],
)
@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_a_base_without_biases_is_refused_with_what_works_there(base, targets):
    with pytest.raises(ValueError, match=r"has no bias, so .* \(LNTuningConfig\) and LoRA"):
        get_peft_model(base(), BitFitConfig(target_modules=targets))


def test_a_base_whose_biases_are_all_left_out_is_refused():
    with pytest.raises(ValueError, match="no bias outside its output head and what the config"):
        tune("bert", exclude_modules=".*")
