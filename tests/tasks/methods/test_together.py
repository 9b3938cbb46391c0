"""Methods that learn together: each does what it does alone, and each is saved by itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from schemas.together import Together
from tasks.core import adapters
from tasks.core.models import head_modules
from tasks.methods.fused import fuse_lora
from tasks.methods.method import trained
from tasks.methods.table import METHODS, methods_of
from tasks.methods.tuners import bitfit, bottleneck
from tasks.register import served_model
from tasks.train.output import save_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
BASES = {
    "causal-lm": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True)
    ),
    "sequence-classification": lambda: BertForSequenceClassification(
        BertConfig(**SIZES, num_labels=5)
    ),
    "token-classification": lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=5)),
}
PARTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 4},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit"},
    "layer_norm": {"method": "layer_norm"},
    "last_layers": {"method": "last_layers", "layers": 1},
    "bottleneck": {"method": "bottleneck", "reduction_factor": 4},
    "double": {"method": "bottleneck", "placement": "double_sequential", "reduction_factor": 4},
    "parallel": {"method": "bottleneck", "placement": "parallel", "reduction_factor": 4},
    "prompt_tuning": {"method": "prompt_tuning", "virtual_tokens": 5},
    "p_tuning": {"method": "p_tuning", "virtual_tokens": 5, "hidden_size": 24},
    "prefix_tuning": {"method": "prefix_tuning", "virtual_tokens": 5},
}
SOFT = {"prompt_tuning", "p_tuning", "prefix_tuning"}


@pytest.fixture(autouse=True)
def _our_tuners() -> Iterator[None]:
    """What is served registers the tuner that travelled with it."""
    yield
    for tuner in (bitfit, bottleneck):
        tuner.register()


def together(*names: str) -> Together:
    return Together.model_validate({"method": "together", "of": [PARTS[name] for name in names]})


def all_pairs() -> list[tuple[str, ...]]:
    found = []
    for pair in combinations(PARTS, 2):
        try:
            together(*pair)
        except ValueError:
            continue
        found.append(pair)
    return found


#: Every pair that a recipe may write, and as many at once as there can be.
COMBINED = [*all_pairs(), ("bitfit", "lora", "ia3", "double", "prefix_tuning")]
USES = [
    (names, task)
    for names in COMBINED
    for task in BASES
    if all(task in method.tasks for method in methods_of(together(*names)))
    # With the base of sequence-classification, so once with the head of the other task.
    and (task != "token-classification" or names == ("lora", "bottleneck"))
]


def test_what_is_tried_holds_the_pairs_of_the_field_and_none_that_is_refused():
    assert {("lora", "prefix_tuning"), ("lora", "bottleneck"), ("bottleneck", "prefix_tuning")} <= {
        *COMBINED
    }
    assert not {("lora", "dora"), ("bottleneck", "double"), ("bitfit", "layer_norm")} & {*COMBINED}


@pytest.mark.parametrize(("names", "task"), USES)
def test_parts_learn_together_and_reload_to_the_same_bits(names, task, tmp_path):
    """In float32: what is trained is the formula, all of it learns, it starts at the base if every
    part does, and what was saved is the same model, for us, for PEFT alone, and where it is served.
    """
    torch.manual_seed(0)
    candidate = together(*names)
    base = BASES[task]().eval()
    untouched = copy.deepcopy(base)
    ids = torch.randint(0, 64, (2, 9))
    before = base(input_ids=ids).logits.detach()
    with torch.device("meta"):
        expected = METHODS["together"].trainable_parameters(BASES[task](), candidate, task)
    model = METHODS["together"].build(base, candidate, task).eval()
    weights = trained(model)
    assert sum(weight.numel() for weight in weights.values()) == expected
    if not SOFT & set(names):
        assert torch.equal(model(input_ids=ids).logits, before)

    model(input_ids=ids).logits.square().sum().backward()
    assert [name for name, weight in weights.items() if weight.grad is None] == []
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.05 * torch.randn_like(weight))
        tuned = model(input_ids=ids).logits
    assert not torch.equal(tuned, before)

    save_model(model, tmp_path / "model", tmp_path, "float32", *methods_of(candidate))
    places = adapters.directories(tmp_path / "model")
    methods = [method.name for method in methods_of(candidate)]
    assert [place.name for place in places] == [f"{n}-{m}" for n, m in enumerate(methods, start=1)]
    loaders = (
        lambda base: adapters.put_on(base, {"default": tmp_path / "model"}),
        lambda base: by_peft_alone(base, places),
        lambda base: served_model.with_adapters(base, served_model.adapters_in(tmp_path / "model")),
    )
    for load in loaders:
        with torch.no_grad():
            again = load(copy.deepcopy(untouched)).eval()(input_ids=ids).logits
        # The same products in the same order.
        assert torch.equal(again, tuned)

    heads = set(head_modules(untouched)) if task != "causal-lm" else set()
    files = [load_file(place / "adapter_model.safetensors") for place in places]
    for number, tensors in enumerate(files, start=1):
        own_heads = {head for head in heads for name in tensors if f".{head}." in f".{name}."}
        # Once, in the last.
        assert own_heads == (heads if number == len(files) else set())
        assert not any("base_layer" in name for name in tensors)
    if "p_tuning" not in names:  # of its network only what it writes is kept
        assert sum(x.numel() for tensors in files for x in tensors.values()) == expected


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize(
    "names",
    [("layer_norm", "lora"), ("layer_norm", "bottleneck"), ("last_layers", "prompt_tuning")],
)
def test_learned_norms_are_in_the_dtype_of_a_base_in_bfloat16(names, task, tmp_path):
    """PEFT makes float32 of them when it puts the next adapter on: no pass would go through."""
    torch.manual_seed(0)
    candidate = together(*names)
    base = BASES[task]().eval().to(torch.bfloat16)
    untouched = copy.deepcopy(base)
    ids = torch.randint(0, 64, (2, 9))
    model = METHODS["together"].build(base, candidate, task).eval()
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.05 * torch.randn_like(weight))
        place = tmp_path / "model"
        save_model(model, place, tmp_path, "bfloat16", *methods_of(candidate))
        ours = adapters.put_on(copy.deepcopy(untouched), {"default": place})
        served = served_model.with_adapters(
            copy.deepcopy(untouched), served_model.adapters_in(place)
        ).eval()
        found = ours(input_ids=ids).logits
        assert torch.equal(served(input_ids=ids).logits, found)
        assert found.isfinite().all()


@pytest.mark.parametrize("around", ["bottleneck", "double", "parallel", "prefix_tuning"])
def test_lora_inside_another_method_trains_on_the_fused_path(around):
    """All of its layers but those that another has put a bias into."""
    layers = 7 * SIZES["num_hidden_layers"]
    model = METHODS["together"].build(BASES["causal-lm"](), together("lora", around), "causal-lm")
    assert fuse_lora(model) == layers
    model = METHODS["together"].build(BASES["causal-lm"](), together("lora", "bitfit"), "causal-lm")
    # Its biases are those of q, k, v and o.
    assert fuse_lora(model) == layers - 4 * SIZES["num_hidden_layers"]


def test_rates_and_decay_are_those_of_the_part_that_has_the_weight():
    candidate = Together.model_validate(
        {"method": "together", "of": [{**PARTS["lora"], "b_rate": 16}, PARTS["prefix_tuning"]]}
    )
    method = METHODS["together"]
    names = list(trained(method.build(BASES["causal-lm"](), candidate, "causal-lm")))
    rates = {name: method.rate_of(candidate, name) for name in names}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {16}
    assert {rate for name, rate in rates.items() if ".lora_B." not in name} == {1}
    still = [name for name in names if not method.decays(name)]
    assert still == [name for name in names if "prompt_encoder" in name] != []


def by_peft_alone(base: Any, places: list[Path]) -> PeftModel:
    """As anybody would load them. Between two stands what `docs/methods.md` says."""
    for place in places:
        if isinstance(base, PeftModel):
            base = base.get_base_model()
            del base.peft_config
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing|Already found")
            base = PeftModel.from_pretrained(base, place)
    return base
