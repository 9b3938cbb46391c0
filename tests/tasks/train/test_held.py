"""The parts of training's peak: counted from real tensors, and without a trace in the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.cost import CostReport
from schemas.recipe import Evaluate
from schemas.report import Memory
from schemas.stages import CostSpec, TrainSpec
from tasks.core.models import load_base
from tasks.core.runtime import tensor_bytes
from tasks.core.tokens import TokenRows
from tasks.cost import stage as plan
from tasks.methods.method import trained
from tasks.methods.table import method_for
from tasks.train import stage
from tasks.train.batching import micro_batches
from tasks.train.computed import flops_per_token
from tasks.train.held import largest_micro_batch, parts_mib
from tasks.train.loop import Job, make_optimizer, train
from tasks.train.loss import loss_sum
from tasks.train.memory import MIB, saved_bytes

FULL = {"method": "full"}
#: With dropout, which draws random numbers in every forward pass.
LORA = {"method": "lora", "rank": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Llama with tied embeddings, and rows of 6 to 40 tokens that count upwards."""
    root = tmp_path_factory.mktemp("held")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    draw = np.random.default_rng(0)
    lengths, starts = draw.integers(6, 41, 90), draw.integers(3, 50, 90)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.ones(offsets[-1], dtype=np.uint8)
    mask[offsets[:-1]] = 0
    ids = np.concatenate([a + np.arange(n) for a, n in zip(starts, lengths, strict=True)])
    (root / "prepared" / "tokens").mkdir(parents=True)
    TokenRows(
        input_ids=ids.astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(90) + 1,
        loss_mask=mask,
        answer_start=np.ones(90, dtype=np.int64),
    ).save(root / "prepared" / "tokens" / "train.safetensors")
    return {"base": root / "base", "prepared": root / "prepared"}


def make_spec(candidate: dict[str, object], **settings: object) -> TrainSpec:
    budget = {"max_steps": 11, "batch_tokens": 400, "micro_batch_tokens": 150}
    return TrainSpec.model_validate(
        {
            "task": "causal-lm",
            "candidate": candidate,
            "train": budget | settings,
            "dtype": "float32",
        }
    )


def make_job(paths: dict[str, Path], candidate: dict[str, object]) -> tuple[nn.Module, Job]:
    spec = make_spec(candidate)
    rows, _ = stage.read_rows(spec, paths["prepared"])
    model = load_base(paths["base"], spec.task, None, "float32")
    built = method_for(spec.candidate.method, spec.task).build(model, spec.candidate, spec.task)
    return built, stage.prepare_job(spec, rows, None, built, 0)


@pytest.mark.parametrize("candidate", [FULL, LORA], ids=["full", "lora"])
def test_the_parts_are_those_of_the_tensors(paths, candidate):
    model, job = make_job(paths, candidate)
    weights = trained(model)
    optimizer = make_optimizer(weights, job.train)
    train(model, weights, optimizer, job)
    parts = parts_mib(model, weights, optimizer, job, peak_mib=100.0)

    batch = job.batch(largest_micro_batch(job))
    loss_sum(model, batch, job.dtype).backward()
    gradients = sum(weight.grad.nbytes for weight in weights.values())
    elements = sum(weight.numel() for weight in weights.values())
    assert parts["train_gradients_mib"] * MIB == gradients == 4 * elements
    # Two moments for each element, and one count of steps for each tensor.
    assert parts["train_optimiser_mib"] * MIB == 8 * elements + 4 * len(weights)
    # The tied head is no second matrix; rotary frequencies are buffers.
    held = sum(weight.nbytes for weight in model.parameters())
    held += sum(buffer.nbytes for buffer in model.buffers())
    assert parts["train_weights_mib"] * MIB == pytest.approx(held, rel=1e-3)
    assert sum(parts.values()) == pytest.approx(100.0)
    assert set(parts) == set(Memory.model_fields) - {
        "train_peak_mib",
        "generate_peak_mib",
        "base_generate_peak_mib",
    }


def test_activations_are_those_of_the_largest_micro_batch_of_the_run(paths):
    """Against counting every micro-batch of every step. What a batch keeps goes by its tokens,
    but for attention's squares and the answers' hidden states: 5 %."""
    model, job = make_job(paths, LORA)
    epochs = -(-job.steps // job.plan.steps_per_epoch)
    assert epochs > 1
    steps = [rows for epoch in range(epochs) for rows in job.plan.epoch(epoch)][: job.steps]
    parts = [part for rows in steps for part in micro_batches(rows, job.rows.lengths, job.layout)]
    assert len(parts) > len(steps)
    kept = [saved_bytes(model, job.batch(part), job.dtype) for part in parts]
    weights = trained(model)
    found = parts_mib(model, weights, make_optimizer(weights, job.train), job, 0.0)
    assert 0.95 * max(kept) <= found["train_activations_mib"] * MIB <= max(kept)
    assert max(kept) > 1.1 * min(kept)


def test_counting_frees_what_the_pass_kept(paths):
    """A tensor that its own operation saves (an exponential's) must not hold its graph."""
    model, job = make_job(paths, LORA)
    made: list[StorageWeakRef] = []

    def exponential(module, inputs, output):
        changed = output.exp().log()
        made.append(StorageWeakRef(output.untyped_storage()))
        made.append(StorageWeakRef(changed.grad_fn._saved_self.untyped_storage()))
        return changed

    hooks = [
        module.register_forward_hook(exponential)
        for name, module in model.named_modules()
        if name.endswith("down_proj")
    ]
    saved_bytes(model, job.batch(np.arange(3)), job.dtype)
    assert len(made) == 2 * len(hooks) > 0
    assert all(storage.expired() for storage in made)


def test_counting_leaves_the_trained_bytes_as_they_are(paths, tmp_path, monkeypatch):
    counted = stage.run(make_spec(LORA), paths, tmp_path / "counted")
    monkeypatch.setattr(stage, "parts_mib", lambda *_: {})
    monkeypatch.setattr(stage, "flops_per_token", lambda *_: 0.0)
    run = stage.run(make_spec(LORA), paths, tmp_path / "not")
    assert set(counted) - set(run) == {
        "train_weights_mib",
        "train_gradients_mib",
        "train_optimiser_mib",
        "train_activations_mib",
        "train_rest_mib",
    }
    name = "model/adapter_model.safetensors"
    assert (tmp_path / "counted" / name).read_bytes() == (tmp_path / "not" / name).read_bytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_were_planned(paths, tmp_path, checkpointing):
    """The plan counts the same micro-batch on shapes: of so few steps it sees them all."""
    spec = make_spec(LORA, gradient_checkpointing=checkpointing)
    trained_facts = stage.run(spec, paths, tmp_path)
    asked = CostSpec(
        task=spec.task,
        shape=None,
        candidates=[spec.candidate],
        train=spec.train,
        evaluate=Evaluate(),
        max_length=64,
        dtype=spec.dtype,
    )
    (tmp_path / "plan").mkdir()
    plan.run(asked, paths, tmp_path / "plan")
    found = CostReport.model_validate_json((tmp_path / "plan" / "plan.json").read_bytes())
    [told] = found.candidates.values()
    assert trained_facts["train_flops_per_token"] == told.flops_per_token > 0


def test_flops_leave_no_gradient(paths):
    model, job = make_job(paths, LORA)
    assert flops_per_token(model, job) > 0
    assert all(weight.grad is None for weight in model.parameters())


def test_views_of_one_storage_count_once():
    tensor = torch.zeros(10)
    assert tensor_bytes([tensor, tensor[2:], tensor.view(2, 5)]) == 40
