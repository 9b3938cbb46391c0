"""QLoRA: what is in 4 bits and what is not, that it learns, and that what ships is the same."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from schemas.candidates import Lora, QLora
from schemas.errors import StageError, UserError
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from schemas.tasks import is_labelled
from tasks.core import quantised
from tasks.core.models import load_base, load_trained
from tasks.evaluate.computation import MicroBatch, backward_flops, forward_flops
from tasks.merge.stage import run as merge
from tasks.methods.method import count_parameters, trained
from tasks.methods.qlora import METHOD, quantisation
from tasks.methods.table import METHODS
from tasks.register.served_model import load_model
from tasks.train.output import save_model

# The narrowest there can be: a layer reads one block. Queries are 64 wide, keys 16.
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(3, 19)[None]
LABELS = ["a", "b", "c"]
PLAIN = Lora(method="lora", rank=4)
TASKS = ("causal-lm", "sequence-classification")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("qlora")
    models = {
        "causal-lm": LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_key_value_heads=1, initializer_range=0.2)
        ),
        "sequence-classification": BertForSequenceClassification(BertConfig(**SHAPE)),
    }
    t5 = T5Config(vocab_size=64, d_model=64, d_ff=192, d_kv=16, num_layers=2, num_heads=4)
    models["seq2seq"] = T5ForConditionalGeneration(t5)
    for task, model in models.items():
        model.save_pretrained(root / task)
        (root / task / "tokenizer_config.json").write_text("{}")
    return {task: root / task for task in models}


def qlora(**given) -> QLora:
    return QLora(method="qlora", rank=4, **given)


def labels(task: str) -> list[str] | None:
    return LABELS if is_labelled(task) else None


def asked(task: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS} if task == "seq2seq" else {})


def base_of(places, task: str, dtype: str = "float32", **given) -> nn.Module:
    return load_base(
        places[task], task, labels(task), dtype, quantisation=quantisation(qlora(**given))
    )


def built(places, task: str = "causal-lm", dtype: str = "float32", **given) -> nn.Module:
    base = base_of(places, task, dtype, **given)
    torch.manual_seed(1)
    return METHOD.build(base, qlora(**given), task).eval()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_the_file_that_was_quantised_nothing_stays_mapped(places, dtype):
    """In the file's own dtype embeddings and head lay in it, and with them all of its pages."""
    model = base_of(places, "causal-lm", dtype)
    assert str(places["causal-lm"]) not in Path("/proc/self/maps").read_text()
    assert next(model.parameters()).isfinite().all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [{}, {"quant_type": "fp4", "double_quantisation": False}])
def test_every_adapted_layer_is_in_4_bits_and_nothing_else(places, task, dtype, given):
    plain = load_base(places[task], task, labels(task), dtype)
    base = base_of(places, task, dtype, **given)
    wanted = METHODS["lora"].build(plain, PLAIN, task)
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in wanted.named_modules()
        if name.endswith(".lora_A")
    }
    layers = quantised.quantised_layers(base)
    assert layers.keys() == adapted
    assert all(isinstance(layer, Linear4bit) for layer in layers.values())
    assert all(layer.weight.dtype == torch.uint8 for layer in layers.values())
    rest = {name: w for name, w in base.named_parameters() if w.dtype != torch.uint8}
    assert all(weight.dtype == getattr(torch, dtype) for weight in rest.values())
    assert count_parameters(base) == count_parameters(
        load_base(places[task], task, labels(task), dtype)
    )
    model = METHOD.build(base, qlora(**given), task)
    count = sum(weight.numel() for weight in trained(model).values())
    assert count == sum(weight.numel() for weight in trained(wanted).values())
    assert all(weight.dtype == torch.float32 for weight in trained(model).values())


def dequantised(places, task: str) -> nn.Module:
    """The base with the weights that its 4 bits stand for, in plain layers."""
    plain = load_base(places[task], task, labels(task), "float32")
    for name, layer in quantised.quantised_layers(base_of(places, task)).items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(name).weight.data = weight
    return plain


def test_weights_are_near_the_bases(places):
    """16 levels over [-m, m], m the largest of a block: the widest gap of NF4 is 0.304 m. In 8
    bits the scale itself is off by less than 1 % (0.7 % was seen)."""
    plain = load_base(places["causal-lm"], "causal-lm", None, "float32")
    for name, layer in quantised.quantised_layers(base_of(places, "causal-lm")).items():
        weight = plain.get_submodule(name).weight
        found = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        largest = weight.view(-1, 64).abs().amax(1)
        error = (found - weight).view(-1, 64).abs().amax(1)
        assert (error <= (0.304 / 2 + 0.01) * largest).all()
        assert not torch.equal(found, weight)


@pytest.mark.parametrize("task", TASKS)
def test_it_is_lora_on_the_weights_that_the_4_bits_stand_for(places, task):
    """Logits and gradients, to float32 sums in another order."""
    results = []
    for four_bits in (True, False):
        base = base_of(places, task) if four_bits else dequantised(places, task)
        torch.manual_seed(1)
        method, candidate = (METHOD, qlora()) if four_bits else (METHODS["lora"], PLAIN)
        model = method.build(base, candidate, task).eval()
        learn(model)
        logits = model(input_ids=IDS).logits
        logits.square().sum().backward()
        results.append({"": logits, **{name: w.grad for name, w in trained(model).items()}})
    assert results[0].keys() == results[1].keys()
    for name, found in results[0].items():
        wanted = results[1][name]
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())), name


def test_a_pass_in_evaluation_mode_changes_nothing_for_training(places):
    """bitsandbytes packs weights anew in such a pass on some CPUs, and then has no gradients."""
    gradients = []
    for looks_first in (False, True):
        model = built(places)
        if looks_first:
            with torch.no_grad():
                loss_of(model)
        model.train()
        for name, weight in trained(model).items():
            if "lora_B" in name:
                nn.init.constant_(weight, 0.01)
        loss_of(model).backward()
        gradients.append({name: weight.grad for name, weight in trained(model).items()})
    assert all(grad.any() for grad in gradients[0].values())
    assert all(torch.equal(grad, gradients[1][name]) for name, grad in gradients[0].items())


def learn(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("task", [*TASKS, "seq2seq"])
@pytest.mark.parametrize("given", [{}, {"dora": True}])
def test_what_ships_is_loaded_and_served_on_the_same_4_bits(tmp_path, places, task, given):
    model = built(places, task, **given)
    learn(model)
    with torch.no_grad():
        tuned = model(**asked(task)).logits
    course = METHOD.course(model, qlora(**given), 10)
    # A T5 has layers that transformers keeps whole, which learn too.
    whole = [n for n, m in model.named_modules() if n.endswith("wo.base_layer")]
    assert len(whole) == (2 * 2 if task == "seq2seq" else 0)
    assert course.finish()["quantised_layers"] == len(quantised.quantised_layers(model))
    target = tmp_path / "model"
    save_model(model, target, places[task], "float32", METHOD)
    course.export(target)
    again = load_trained(places[task], target, task, labels(task), "float32")
    base = {
        "path": str(places[task]),
        "model": "base",
        "revision": None,
        "sha256": {},
    }
    serving = {"task": task, "dtype": "float32", "base": base, "labels": labels(task)}
    served = load_model(tmp_path, serving).eval()
    with torch.no_grad():
        # The same weights, quantised by the same function, and the same products.
        assert torch.equal(again(**asked(task)).logits, tuned)
        assert torch.equal(served(**asked(task)).logits, tuned)
    assert "quantis" not in (target / "adapter_config.json").read_text()
    assert (places[task] / "model.safetensors").stat().st_size > 0


def test_a_merge_folds_into_the_base_as_it_is(tmp_path, places):
    task = "causal-lm"
    model = built(places)
    learn(model)
    course = METHOD.course(model, qlora(), 10)
    target = tmp_path / "trained" / "model"
    save_model(model, target, places[task], "float32", METHOD)
    course.export(target)
    (tmp_path / "merged").mkdir()
    merge(
        MergeSpec(finish=Finish(merge=True)),
        {"base": places[task], "trained": target.parent},
        tmp_path / "merged",
    )
    merged = load_file(tmp_path / "merged" / "model" / "model.safetensors")
    before = load_file(places[task] / "model.safetensors")
    adapter = load_file(target / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    # float32: a sum of 4 products and one weight, in another order.
    assert torch.allclose(merged[f"{name}.weight"], before[f"{name}.weight"] + 8 * b @ a, atol=1e-6)
    whole = load_trained(places[task], target, task, None, "float32", quantised_base=False)
    fresh = load_base(tmp_path / "merged" / "model", task, None, "float32")
    with torch.no_grad():
        assert torch.allclose(whole(input_ids=IDS).logits, fresh(input_ids=IDS).logits, atol=1e-4)


def test_flops_are_those_of_lora_but_for_attention_kept_alike(places):
    """The products are the same, whatever the weights are kept in."""
    learned_BT = torch.ones_like(IDS, dtype=torch.bool)
    learned_BT[:, 0] = False
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    batch = MicroBatch(inputs, IDS.numel(), learned_BT=learned_BT)
    plain = load_base(places["causal-lm"], "causal-lm", None, "float32")
    lora = METHODS["lora"].build(plain, PLAIN, "causal-lm").eval()
    four = built(places)
    assert forward_flops(four, batch) == forward_flops(lora, batch)
    assert backward_flops(four, batch) == backward_flops(lora, batch)


def test_a_base_that_was_not_quantised_is_found_out(places):
    plain = load_base(places["causal-lm"], "causal-lm", None, "float32")
    model = METHOD.build(plain, qlora(), "causal-lm")
    with pytest.raises(StageError, match="not in 4 bits"):
        METHOD.course(model, qlora(), 10).finish()


def test_a_base_in_4_bits_already_is_refused(tmp_path, places):
    for path in places["causal-lm"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised already"):
        load_base(tmp_path, "causal-lm", None, "float32", quantisation=quantisation(qlora()))


def test_a_layer_of_no_whole_blocks_is_refused_on_shapes_and_on_loading(tmp_path):
    """There bitsandbytes takes the scales of other blocks."""
    config = LlamaConfig(**{**SHAPE, "intermediate_size": 80})
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config)
    words = r"mlp\.down_proj of this base reads 80 features, no multiple of 64"
    with pytest.raises(UserError, match=rf"qlora\].*{words}"):
        METHOD.build(shapes, qlora(), "causal-lm")
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        load_base(tmp_path, "causal-lm", None, "float32", quantisation=quantisation(qlora()))


def test_without_bitsandbytes_the_error_says_what_to_do(places, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *_: None if name == "bitsandbytes" else found(name),
    )
    with torch.device("meta"):
        shapes = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with pytest.raises(UserError, match=r"qlora\][\s\S]*pip install bitsandbytes.*x86_64"):
        METHOD.build(shapes, qlora(), "causal-lm")
