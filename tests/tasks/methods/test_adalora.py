"""AdaLoRA: its schedule and penalty by hand, its state, and the plain LoRA that it ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import AdaLora
from schemas.errors import StageError, UserError
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from tasks.core.models import load_base, load_trained
from tasks.merge.stage import run as merge
from tasks.methods.adalora import METHOD, AdaLoraCourse
from tasks.methods.method import trained
from tasks.train.output import save_model

IDS = torch.arange(3, 19)[None]
STEPS = 20


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
    place = tmp_path_factory.mktemp("adalora") / "base"
    LlamaForCausalLM(config).save_pretrained(place)
    (place / "tokenizer_config.json").write_text("{}")
    return place


def adalora(**given) -> AdaLora:
    return AdaLora(method="adalora", **{"rank": 2, "initial_rank": 4, "alpha": 8, **given})


def built(place: Path, dtype: str = "float32", **given) -> tuple[nn.Module, AdaLoraCourse, AdaLora]:
    torch.manual_seed(1)
    base = load_base(place, "causal-lm", None, dtype)
    model = METHOD.build(base, adalora(**given), "causal-lm")
    course = METHOD.course(model, adalora(**given), STEPS)
    assert isinstance(course, AdaLoraCourse)
    return model, course, adalora(**given)


def teach(model: nn.Module, course: AdaLoraCourse, steps: range) -> None:
    """Plain training to say the row by heart."""
    optimizer = torch.optim.Adam(trained(model).values(), lr=0.02)
    for step in steps:
        (model(input_ids=IDS, labels=IDS).loss + course.penalty()).backward()
        optimizer.step()
        course.after_step(step)
        optimizer.zero_grad()


def singular_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: w.detach() for name, w in model.named_parameters() if ".lora_E." in name}


def test_the_penalty_is_the_mean_distance_from_orthonormal(place):
    model, course, _ = built(place, orthogonality=0.3)
    found = []
    for name, weight in trained(model).items():
        if "lora_A" in name:
            found.append((weight @ weight.T - torch.eye(4)).square().sum().sqrt())
        elif "lora_B" in name:
            found.append((weight.T @ weight - torch.eye(4)).square().sum().sqrt())
    assert len(found) == 2 * 14
    expected = 0.3 * sum(found) / len(found)
    assert course.penalty().item() == pytest.approx(expected.item(), rel=1e-5)
    course.penalty().backward()
    assert all(w.grad is not None for name, w in trained(model).items() if "lora_E" not in name)


def test_ranks_fall_along_the_cubic_schedule_and_then_stay(place):
    """Zhang et al., equation 12: with 14 layers from 4 to 2 each, 2 of 20 steps before and the
    last 6 after."""
    model, course, _ = built(place, warmup=0.1, final=0.3)
    for step in range(1, STEPS + 1):
        teach(model, course, range(step, step + 1))
        left = sum(int((e != 0).sum()) for e in singular_values(model).values())
        if step <= 2:
            expected = 56
        elif step < 14:
            expected = int(28 * (1 - (step - 2) / (20 - 2 - 6)) ** 3 + 28)
        else:
            expected = 28
        assert left == expected, step
        assert sum(course.ranks().values()) == (expected if step > 2 else 0)
    ranks = course.ranks()
    assert len(ranks) == 14
    assert len(set(ranks.values())) > 1
    facts = course.finish()["ranks"]
    assert facts["mean"] == 2
    assert facts["least"] == min(ranks.values())
    assert facts["most"] == max(ranks.values())
    assert set(facts["mean_of"]) == {name.rsplit(".", 1)[-1] for name in ranks}


def test_without_steps_it_is_an_error_and_not_plain_lora(place):
    _, course, _ = built(place)
    with pytest.raises(StageError, match=r"ranks of 0 in all.*did not run"):
        course.finish()


@pytest.mark.parametrize("moment", [1, 8, 14, 17])
def test_a_restored_course_goes_on_as_it_would_have(place, moment):
    """Stopped before, while and after ranks are given away; through what a file can hold."""
    first, course, _ = built(place)
    teach(first, course, range(1, moment + 1))
    state = {name: value.clone() for name, value in course.state().items()}
    second, other, _ = built(place)
    second.load_state_dict(first.state_dict())
    other.restore(state)
    for model, its in ((first, course), (second, other)):
        teach(model, its, range(moment + 1, STEPS + 1))
    assert course.ranks() == other.ranks()
    assert other.state().keys() == course.state().keys()
    for name, weight in trained(first).items():
        assert torch.equal(weight, trained(second)[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_ships_is_a_plain_lora_of_those_ranks(tmp_path, place, dtype):
    """Loaded by PEFT, and folded by our merge: the model that was trained. One layer has no rank
    left, another all of its own."""
    model, course, _ = built(place, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        teach(model, course, range(1, STEPS + 1))
    pattern = course.config.rank_pattern
    none, every, *_ = pattern
    pattern[none], pattern[every] = [False] * 4, [True] * 4
    with torch.no_grad():
        dict(model.named_parameters())[f"base_model.model.{none}"].zero_()
        tuned = model.eval()(input_ids=IDS).logits
    target = tmp_path / "trained" / "model"
    save_model(model, target, place, dtype, METHOD)
    course.export(target)
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "base"
    ranks = {name: rank for name, rank in course.ranks().items() if rank}
    assert len(ranks) < 14
    assert config["target_modules"] == sorted(ranks)
    again = load_trained(place, target, "causal-lm", None, dtype)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in again.named_modules()
        if isinstance(layer, LoraLinear)
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    saved = load_file(target / "adapter_model.safetensors")
    for name, layer in layers.items():
        assert torch.equal(
            layer.lora_A["default"].weight, saved[f"base_model.model.{name}.lora_A.weight"]
        )
    (tmp_path / "merged").mkdir()
    merge(
        MergeSpec(finish=Finish(merge=True)),
        {"base": place, "trained": target.parent},
        tmp_path / "merged",
    )
    merged = load_base(tmp_path / "merged" / "model", "causal-lm", None, dtype)
    plain = load_base(place, "causal-lm", None, dtype)
    with torch.no_grad():
        # Sums in another order, and in bfloat16 each layer's own rounding, through two blocks.
        bound = 64 * torch.finfo(torch.float32).eps if dtype == "float32" else 0.05
        bound *= tuned.abs().max()
        assert (again(input_ids=IDS).logits - tuned).abs().max() <= bound
        assert (merged(input_ids=IDS).logits - tuned).abs().max() <= bound
        assert (plain(input_ids=IDS).logits - tuned).abs().max() > 5 * bound


def test_a_rank_that_a_layer_cannot_have_is_refused(place):
    with pytest.raises(UserError, match=r"33, but .*q_proj.* only 32 wide[\s\S]*at most 32"):
        built(place, initial_rank=33)


def test_a_run_too_short_to_give_ranks_away_is_refused(place):
    model, _, candidate = built(place, warmup=0.5, final=0.49)
    METHOD.course(model, candidate, 3)  # One step of warm-up, one of the end, and one between.
    with pytest.raises(UserError, match="run of 1 steps has none left"):
        METHOD.course(model, candidate, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 4}, "not below initial_rank 4"),
        ({"warmup": 0.5, "final": 0.5}, "leave no step"),
    ],
)
def test_a_schedule_that_takes_nothing_away_is_no_recipe(given, words):
    with pytest.raises(ValueError, match=words):
        adalora(**given)
