"""A step of several micro-batches: those after the first run beside the gradients of the others."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import Full, Lora
from schemas.recipe import Train
from schemas.stages import CostSpec
from tasks.core.models import load_base
from tasks.core.plan import Plan
from tasks.core.tokens import TokenRows
from tasks.cost import dry
from tasks.cost.ledger import Ledger
from tasks.cost.rows import OF_A_TOKEN, FullRow, full_rows, kept_by, load_of
from tasks.cost.shapes import candidate_on_meta
from tasks.cost.stage import run
from tasks.methods.table import METHODS
from tasks.train import pairs, placement
from tasks.train.batching import Layout, micro_batches
from tasks.train.loss import loss_sum

TASK = "causal-lm"
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CANDIDATES = {"full": Full(method="full"), "lora": Lora(method="lora", rank=32)}
PACKED = Layout(192, packed=True)


def placed(model: torch.nn.Module, train: Train, device: str) -> torch.nn.Module:
    placement.place(model, train, torch.device(device))
    placement.use_fast_attention(model, torch.device("cpu"), 64, TASK)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CANDIDATES)
def test_its_peak_is_that_of_the_second_of_two_real_passes(tmp_path, name, checkpointing):
    """The gradients that the dry run begins with are those that a first real pass leaves."""
    rows = full_rows(192, FullRow(64), TASK)
    batch = pairs.batch_of(rows, np.arange(len(rows)), TASK, PACKED)
    train = Train(gradient_checkpointing=checkpointing)
    model = candidate_on_meta(copy.deepcopy(CONFIG), TASK, CANDIDATES[name], "float32")
    placed(model, train, "meta")
    dry.without_numbers(model)
    first = dry._pass(model, batch, "float32")
    guessed = dry._pass(model, batch, "float32", accumulates=True)

    LlamaForCausalLM(copy.deepcopy(CONFIG)).save_pretrained(tmp_path)
    base = load_base(tmp_path, TASK, None, "float32")
    built = placed(METHODS[name].build(base, CANDIDATES[name], TASK), train, "cpu")
    ledger = Ledger([*built.parameters(), *built.buffers()])
    with ledger:
        with torch.no_grad():
            loss_sum(built, batch, torch.float32)
        floor = ledger.live
        for _ in range(2):
            ledger.history = []
            loss_sum(built, batch, torch.float32).backward()
    # As in test_cost.py: some kernels hand out a scalar more or less without numbers.
    assert guessed.peak == pytest.approx(max(ledger.history) - floor, rel=0.01)
    assert guessed.peak > first.peak


def test_the_largest_of_them_is_found(tmp_path):
    """Over all steps, each cut as in training."""
    lengths = np.random.default_rng(0).integers(8, 64, 120)
    ends = np.cumsum([0, *lengths])
    rows = TokenRows(
        input_ids=np.zeros(ends[-1], np.int32),
        offsets=ends,
        source_rows=np.arange(len(lengths)),
        loss_mask=np.ones(ends[-1], np.uint8),
        answer_start=np.zeros(len(lengths), np.int64),
        labels=np.zeros(len(lengths), np.int64),
    )
    (tmp_path / "tokens").mkdir()
    rows.save(tmp_path / "tokens" / "train.safetensors")
    train = Train(batch_tokens=PACKED.budget, max_steps=5)
    steps = Plan(rows.lengths, train.batch_tokens, train.seed).epoch(0)[:5]
    cut = [micro_batches(step, rows.lengths, PACKED) for step in steps]
    later = [kept_by(rows.lengths[part], PACKED) for parts in cut for part in parts[1:]]
    load = load_of(tmp_path, TASK, train, PACKED, FullRow(64))
    assert kept_by(rows.lengths[load.later], PACKED) == max(later)
    # A budget that takes every step whole leaves none.
    assert load_of(tmp_path, TASK, train, Layout(10_000, packed=True), FullRow(64)).later is None


def test_padding_that_goes_through_the_layers_counts():
    """2,560 positions of long rows against 4,224 of more and shorter ones, of fewer tokens. Without
    padding the long ones keep more; virtual tokens in every layer are tokens too."""
    long, short = np.full(20, 128), np.array([96] + [40] * 43)
    padded = Layout(4096, packed=False)
    assert kept_by(short, padded) > kept_by(long, padded) == 20 * 128 * (OF_A_TOKEN + 128)
    for layout in (PACKED, Layout(4096, packed=False, unpadded=True)):
        assert kept_by(short, layout) < kept_by(long, layout)
    # A length of more than 64 is filled up to a multiple of 32.
    assert kept_by(np.array([65, 9]), padded) == kept_by(np.array([96, 96]), padded)
    behind = Layout(4096, packed=False, virtual=20)
    assert kept_by(np.array([12]), behind) == kept_by(np.array([32]), padded)
    # Sources and targets are padded apart, and virtual tokens are of the sources.
    pairs = np.array([[12, 8], [4, 24]])
    assert kept_by(pairs, behind) == kept_by(np.array([[32, 24], [32, 24]]), padded)


def test_a_step_of_two_full_micro_batches_holds_every_gradient_at_its_peak(tmp_path):
    """With the moments; a step of one micro-batch peaks before, where few gradients are there."""
    found = {}
    for tokens in (2048, 4096):
        spec = CostSpec.model_validate(
            {
                "task": TASK,
                "shape": CONFIG.to_dict(),
                "candidates": [CANDIDATES["full"]],
                "train": {"micro_batch_tokens": 2048, "batch_tokens": tokens},
                "evaluate": {},
                "max_length": 64,
                "dtype": "float32",
            }
        )
        found[tokens] = run(spec, {}, Path(tmp_path))["candidates"]["full"]
    one, two = (found[tokens]["training_mib"] for tokens in (2048, 4096))
    gradients = 4 * found[4096]["trainable_parameters"] / 2**20
    assert two["gradients"] == pytest.approx(gradients)
    assert one["gradients"] == 0
    # Those of the layers behind the peak would have been there too.
    assert 0.3 * gradients < two["total"] - one["total"] <= 1.01 * gradients
