"""PiSSA and OLoRA: where they start, and that what ships is for the base as the user has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import Lora
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from tasks.core.models import load_base, load_trained
from tasks.merge.stage import run as merge
from tasks.methods.fused import fuse_lora
from tasks.methods.lora import METHOD
from tasks.methods.method import trained
from tasks.train.output import save_model

IDS = torch.arange(3, 19)[None]
VARIANTS = [
    {"init": "pissa"},
    {"init": "olora"},
    {"init": "pissa", "rslora": True, "ranks": {"down_proj": 6}},
    {"init": "olora", "dora": True},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    place = tmp_path_factory.mktemp("start") / "base"
    LlamaForCausalLM(config).save_pretrained(place)
    (place / "tokenizer_config.json").write_text("{}")
    return place


def lora(**given) -> Lora:
    return Lora(method="lora", rank=4, alpha=8, **given)


def built(place: Path, dtype: str = "float32", **given) -> nn.Module:
    base = load_base(place, "causal-lm", None, dtype)
    torch.manual_seed(1)
    return METHOD.build(base, lora(**given), "causal-lm").eval()


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLinear)
    }


@pytest.mark.parametrize("given", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_start_is_the_base_to_one_rounding(place, given, dtype):
    """W from R, B0 and A0, for every layer; and the logits, also on our fused path."""
    plain = load_base(place, "causal-lm", None, dtype)
    model = built(place, dtype, **given)
    eps = torch.finfo(torch.bfloat16 if dtype == "bfloat16" else torch.float32).eps
    for name, layer in layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        whole = layer.base_layer.weight.float() + layer.scaling["default"] * b @ a
        weight = plain.get_submodule(name).weight.float()
        # R rounded to its dtype: half an eps of R, and R is no longer than W's largest entries.
        # In float32 the product's own sums of 4 to 6 terms are of that size too.
        assert (whole - weight).abs().max() <= 4 * eps * weight.abs().max()
    with torch.no_grad():
        before = plain(input_ids=IDS).logits
        # Those roundings through two blocks of width 32, relative to the largest logit.
        bound = 32 * eps * before.abs().max()
        assert (model(input_ids=IDS).logits - before).abs().max() <= bound
        assert fuse_lora(model) == 14
        assert (model(input_ids=IDS).logits - before).abs().max() <= bound


def test_pissa_holds_the_largest_singular_values(place):
    """As much of W as the best matrix of that rank, by Eckart and Young, to 1 %."""
    plain = load_base(place, "causal-lm", None, "float32")
    for name, layer in layers(built(place, init="pissa")).items():
        singular = torch.linalg.svdvals(plain.get_submodule(name).weight)
        left = layer.base_layer.weight.norm()
        assert left <= 1.01 * singular[4:].norm()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        # Evenly shared between the two.
        assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-3)


def test_olora_starts_with_orthonormal_columns(place):
    for layer in layers(built(place, init="olora")).values():
        b = layer.lora_B["default"].weight
        assert torch.allclose(b.T @ b, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("given", VARIANTS)
def test_what_ships_is_a_plain_lora_on_the_base_as_it_was(tmp_path, place, given):
    """In file, loaded by PEFT, and folded by our merge: the model that was trained."""
    candidate, model = lora(**given), built(place, **given)
    course = METHOD.course(model, candidate, 10)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        tuned = model(input_ids=IDS).logits
    target = tmp_path / "trained" / "model"
    save_model(model, target, place, "float32", METHOD)
    course.export(target)

    config = json.loads((target / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 8
    saved = load_file(target / "adapter_model.safetensors")
    ranks = {name: len(weight) for name, weight in saved.items() if "lora_A" in name}
    down = 2 * given.get("ranks", {}).get("down_proj", 4)
    assert set(ranks.values()) == {8, down}
    assert all(rank == down for name, rank in ranks.items() if "down_proj" in name)

    again = load_trained(place, target, "causal-lm", None, "float32")
    plain = load_base(place, "causal-lm", None, "float32")
    merged_dir = tmp_path / "merged"
    merged_dir.mkdir()
    merge(
        MergeSpec(finish=Finish(merge=True)),
        {"base": place, "trained": target.parent},
        merged_dir,
    )
    merged = load_base(merged_dir / "model", "causal-lm", None, "float32")
    with torch.no_grad():
        # float32 sums in another order, through two blocks.
        bound = 64 * torch.finfo(torch.float32).eps * tuned.abs().max()
        assert (again(input_ids=IDS).logits - tuned).abs().max() <= bound
        assert (merged(input_ids=IDS).logits - tuned).abs().max() <= bound
        assert (plain(input_ids=IDS).logits - tuned).abs().max() > 1e-2
    assert isinstance(again, PeftModel)


def test_untrained_it_ships_nothing_but_rounding(tmp_path, place):
    model = built(place, init="pissa")
    course = METHOD.course(model, lora(init="pissa"), 10)
    save_model(model, tmp_path / "model", place, "float32", METHOD)
    course.export(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    for name, a in saved.items():
        if "lora_A" in name:
            b = saved[name.replace("lora_A", "lora_B")]
            # Two equal products of 4 terms with opposite signs.
            assert (b @ a).abs().max() <= 1e-6 * (b.abs() @ a.abs()).max()


def test_names_and_shapes_alone():
    assert lora(init="pissa").label == "lora-r4-pissa"
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        model = METHOD.build(LlamaForCausalLM(config), lora(init="pissa"), "causal-lm")
        plain = METHOD.build(LlamaForCausalLM(config), lora(), "causal-lm")
    counts = [sum(w.numel() for w in trained(m).values()) for m in (model, plain)]
    assert counts[0] == counts[1]
