"""A plan is the training step itself without its numbers: held against the step with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from schemas.candidates import Full, Ia3, LayerNorm, Lora, Peft
from schemas.errors import UserError
from schemas.recipe import Base, Train
from schemas.stages import CostSpec
from tasks.cost import dry
from tasks.cost.blocks import plans, stack_of
from tasks.cost.rows import full_rows
from tasks.cost.shapes import candidate_on_meta
from tasks.cost.stage import run
from tasks.methods.table import method_for
from tasks.train import placement
from tasks.train.batching import Batch, collate, collate_packed
from tasks.train.loss import backbone, loss_sum
from tasks.train.unpad import unpad

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
CONFIGS = {
    "causal-lm": LlamaConfig(**SIZES, num_key_value_heads=2),
    "sequence-classification": BertConfig(**SIZES),
}
CLASSES = {"causal-lm": LlamaForCausalLM, "sequence-classification": BertForSequenceClassification}
CANDIDATES = {
    "full": Full(method="full"),
    "lora": Lora(method="lora", rank=4),
    "dora": Lora(method="lora", rank=4, dora=True),
    "ia3": Ia3(method="ia3"),
    "layer_norm": LayerNorm(method="layer_norm"),
    # Its tuner keeps indices beside weights and buffers.
    "fourierft": Peft(
        method="peft",
        peft={"peft_type": "FOURIERFT", "n_frequency": 50, "target_modules": "all-linear"},
    ),
}
#: GPT-3 with q and v apart. Brown et al. 2020, arXiv:2005.14165; LoRA's claim: arXiv:2106.09685.
GPT3 = {
    "model_type": "opt",
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "ffn_dim": 49152,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
}


def batch_of(task: str) -> Batch:
    rows = full_rows(192, 64)
    index = torch.arange(len(rows)).numpy()
    return collate_packed(rows, index) if task == "causal-lm" else collate(rows, index, task, 0)


def placed(model: torch.nn.Module, task: str, train: Train, device: str) -> torch.nn.Module:
    placement.place(model, train, torch.device(device))
    placement.use_fast_attention(model, torch.device("cpu"), 64, task)
    if task != "causal-lm":
        unpad(backbone(model))
    return model


def real(task: str, candidate: str, train: Train) -> torch.nn.Module:
    base = CLASSES[task](copy.deepcopy(CONFIGS[task]))
    model = method_for(CANDIDATES[candidate].method, task).build(base, CANDIDATES[candidate], task)
    return placed(model, task, train, "cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", CONFIGS)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_a_dry_run_is_the_run_without_its_numbers(task, candidate, checkpointing):
    """The same ledger over the real model: bytes kept, peaks and FLOPs, to the last one."""
    train = Train(gradient_checkpointing=checkpointing)
    model = candidate_on_meta(copy.deepcopy(CONFIGS[task]), task, CANDIDATES[candidate], "float32")
    placed(model, task, train, "meta")
    dry.without_numbers(model)
    guessed = dry._pass(model, batch_of(task), "float32")
    measured = dry._pass(real(task, candidate, train), batch_of(task), "float32")
    assert guessed.forward_flops == measured.forward_flops > 0
    assert guessed.backward_flops == measured.backward_flops > 0
    # Some kernels hand out a scalar more or less without numbers: under 1 % of a tiny model.
    assert guessed.kept == pytest.approx(measured.kept, rel=0.01)
    assert guessed.peak == pytest.approx(measured.peak, rel=0.01)


@pytest.mark.parametrize("task", CONFIGS)
@pytest.mark.parametrize("candidate", ["full", "ia3"])
def test_flops_are_those_of_torch(task, candidate):
    """torch's counter over a real step. (It misses products in place, which fused LoRA has.)"""
    model, batch = real(task, candidate, Train()), batch_of(task)
    guessed = dry._pass(model, batch, "float32")
    with FlopCounterMode(display=False) as counter:
        loss = loss_sum(model, batch, torch.float32)
        forward = counter.get_total_flops()
        loss.backward()
    assert guessed.forward_flops == pytest.approx(forward, rel=0.02)
    assert guessed.backward_flops == pytest.approx(counter.get_total_flops() - forward, rel=0.02)


@pytest.mark.parametrize("trained_blocks", [6, 2])
def test_a_few_blocks_tell_what_all_of_them_cost(trained_blocks):
    """Also where the last two blocks alone learn: two runs of blocks that are alike."""
    model = candidate_on_meta(
        copy.deepcopy(CONFIGS["causal-lm"]), "causal-lm", CANDIDATES["full"], "float32"
    )
    model.requires_grad_(False)
    for block in model.model.layers[-trained_blocks:]:
        block.requires_grad_(True)
    placed(model, "causal-lm", Train(), "meta")
    dry.without_numbers(model)
    stack = stack_of(model)
    assert stack is not None
    assert stack.runs == ([6] if trained_blocks == 6 else [4, 2])
    batch = batch_of("causal-lm")
    total = dry.Pass(0, 0, 0, 0, 0, 0)
    for kept, times in plans(stack.runs):
        with stack.cut(kept):
            total += dry._pass(model, batch, "float32").times(times)
    whole = dry._pass(model, batch, "float32")
    assert total.forward_flops == pytest.approx(whole.forward_flops)
    assert total.backward_flops == pytest.approx(whole.backward_flops)
    assert total.kept == pytest.approx(whole.kept)
    # The halves of a backward pass meet in the middle of a block.
    assert total.peak == pytest.approx(whole.peak, rel=0.02)


def gpt3(*candidates: object, dtype: str = "float32") -> CostSpec:
    return CostSpec.model_validate(
        {
            "task": "causal-lm",
            "shape": GPT3,
            "candidates": list(candidates),
            "train": {"micro_batch_tokens": 2048},
            "evaluate": {},
            "max_length": 2048,
            "dtype": dtype,
        }
    )


def test_lora_on_gpt3_trains_ten_thousand_times_less_in_a_third_of_the_memory(tmp_path):
    """Hu et al. 2021, abstract: 10,000 times fewer trainable parameters, 3 times less memory."""
    lora = Lora(method="lora", rank=4, target_modules=["q_proj", "v_proj"])
    found = run(gpt3(Full(method="full"), lora), {}, tmp_path)["candidates"]
    full, small = found["full"], found["lora-r4"]
    # Rank 4 on two square matrices of 12,288 in 96 layers.
    assert small["trainable_parameters"] == 96 * 2 * 4 * 2 * 12288
    ratio = full["trainable_parameters"] / small["trainable_parameters"]
    assert 9_000 < ratio < 10_000
    assert 3.0 < full["training_mib"]["total"] / small["training_mib"]["total"] < 4.0
    # 2 FLOPs a weight, two passes' worth for gradients of both inputs and weights.
    assert full["forward_flops_per_token"] == pytest.approx(2 * 174.6e9, rel=0.03)
    assert full["backward_flops_per_token"] == pytest.approx(4 * 174.6e9, rel=0.03)


def test_every_problem_of_a_shape_and_its_candidates_is_placed(tmp_path):
    wrong = Lora(method="lora", target_modules=["q_prj"])
    with pytest.raises(UserError) as caught:
        run(gpt3(Full(method="full"), wrong), {}, tmp_path)
    assert caught.value.problems[0].place == "candidates[1].target_modules"
    unknown = gpt3(Full(method="full")).model_copy(update={"shape": {"model_type": "lama"}})
    with pytest.raises(UserError, match=r"base\.shape"):
        run(unknown, {}, tmp_path)


def test_a_directory_needs_no_weights_and_its_figures_add_up(tmp_path: Path) -> None:
    CONFIGS["causal-lm"].save_pretrained(tmp_path / "base")
    spec = gpt3(*CANDIDATES.values()).model_copy(
        update={"shape": None, "max_length": 64, "candidates": [CANDIDATES["lora"]]}
    )
    found = run(spec, {"base": tmp_path / "base"}, tmp_path)["candidates"]["lora-r4"]
    parts = dict(found["training_mib"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert found["steps"] is None
    assert found["shipped_mib"] == found["trainable_parameters"] * 4 / 2**20


@pytest.mark.parametrize("given", [{}, {"model": "a", "shape": {"model_type": "llama"}}])
def test_a_base_is_a_model_or_a_shape(given):
    with pytest.raises(ValueError, match="exactly one of `model` and `shape`"):
        Base(**given)
