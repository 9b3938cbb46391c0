"""The loss by blocks is the loss of the whole logits, and does not depend on how a step is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.errors import UserError
from tasks.core.tokens import TokenRows
from tasks.train import loss as loss_module
from tasks.train.batching import Layout, collate, collate_packed, micro_batches
from tasks.train.loss import head_loss, loss_sum
from tasks.train.probe import check_loss, own_loss, probe_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_blocks_give_the_whole_cross_entropy(monkeypatch, bias, trained):
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * 31 * 7)  # blocks of 7 positions
    torch.manual_seed(0)
    head = nn.Linear(12, 31, bias=bias).requires_grad_(trained)
    hidden = torch.randn(40, 12, requires_grad=True)
    target = torch.randint(0, 31, (40,))
    wanted = [hidden, *(head.parameters() if trained else ())]
    ours = head_loss(head, hidden, target, torch.float32)
    theirs = F.cross_entropy(head(hidden), target, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * theirs, wanted), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_and_hopeless_targets_keep_their_loss_and_gradient(dtype):
    """Targets whose probability is nearly 1, where p - 1 has no bits left in bfloat16, and ones
    whose probability is below the smallest number: against float64."""
    hidden = torch.eye(4, requires_grad=True)
    # Logit of the target, where that of the only rival is 0. All are numbers of bfloat16.
    weight = torch.zeros(9, 4)
    weight[0] = torch.tensor([9.0, 0.5, -20.0, -150.0])
    weight[2:] = -300.0
    target = torch.zeros(4, dtype=torch.int64)
    ours = loss_module.LinearCrossEntropy.apply(hidden, weight, None, target, dtype)
    exact = F.cross_entropy((hidden.double() @ weight.double().T), target, reduction="none")
    # bfloat16: a probability has 8 bits, so that its logarithm is off by 0.004 at most.
    sure = 1e-5 if dtype == torch.float32 else 2**-8
    assert torch.allclose(ours.double(), exact.sum(), rtol=1e-5, atol=4 * sure)
    got, expected = (torch.autograd.grad(loss, hidden)[0] for loss in (ours, exact.sum()))
    assert torch.allclose(got.double().diag(), expected.double().diag(), rtol=2 * sure)
    assert (got.diag() != 0).all()


def test_a_head_that_is_adapted_itself_gives_the_same(monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * 31 * 7)
    torch.manual_seed(0)
    wrapped = get_peft_model(nn.Sequential(nn.Linear(12, 31)), LoraConfig(target_modules=["0"]))
    head = wrapped.base_model.model[0]
    hidden, target = torch.randn(40, 12, requires_grad=True), torch.randint(0, 31, (40,))
    ours = head_loss(head, hidden, target, torch.float32)
    theirs = F.cross_entropy(head(hidden), target, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-5)
    weights = [hidden, *(w for w in head.parameters() if w.requires_grad)]
    for a, b in zip(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-4)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def make_rows(count: int = 12) -> TokenRows:
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 40, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = np.ones(offsets[-1], dtype=np.uint8)
    mask[offsets[:-1] + 1] = 0
    return TokenRows(
        input_ids=draw.integers(0, 97, offsets[-1]).astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(count),
        loss_mask=mask,
    )


def test_the_head_runs_at_learned_positions_only(monkeypatch):
    model, rows = tiny_llama(), make_rows()
    seen = []
    original = loss_module.head_loss
    monkeypatch.setattr(
        loss_module,
        "head_loss",
        lambda head, hidden, *rest: seen.append(len(hidden)) or original(head, hidden, *rest),
    )
    index = np.arange(len(rows))
    loss_sum(model, collate(rows, index, "causal-lm", 0), torch.float32)
    # All tokens but each row's first (nothing predicts it) and second (masked above).
    assert seen == [int(rows.lengths.sum()) - 2 * len(rows)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [48, 10_000])
def test_cutting_a_step_does_not_change_its_gradient(packed, budget):
    """Slow reference: transformers' own loss of each row, summed over the step's answer tokens.

    Rows differ in length and answers, so a mean of the micro-batches' means would be wrong.
    """
    model, rows = tiny_llama(), make_rows()
    weights = list(model.parameters())
    learned = int(rows.loss_mask.sum()) - len(rows)
    for i in range(len(rows)):
        ids = torch.from_numpy(rows.row(i).astype(np.int64))[None]
        labels = ids.clone()
        labels[0, torch.from_numpy(rows.mask(i)) == 0] = -100
        answers = int((labels[0, 1:] != -100).sum())
        (model(ids, labels=labels).loss * answers / learned).backward()
    expected = [weight.grad.clone() for weight in weights]

    model.zero_grad()
    parts = micro_batches(np.arange(len(rows)), rows.lengths, Layout(budget, packed))
    assert (len(parts) > 1) == (budget == 48)
    for part in parts:
        batch = collate_packed(rows, part) if packed else collate(rows, part, "causal-lm", 0)
        (loss_sum(model, batch, torch.float32) / learned).backward()
    for weight, reference in zip(weights, expected, strict=True):
        # float32 rounding of sums in another order.
        assert torch.allclose(weight.grad, reference, atol=1e-6, rtol=1e-4)


def test_a_model_that_changes_its_logits_is_refused():
    model, rows = tiny_llama(), probe_rows(make_rows())
    expected = own_loss(model, rows, "causal-lm", CPU)
    check_loss(model, rows, "causal-lm", Layout(512, packed=False), expected, CPU, torch.float32)

    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 3
            return output

    capped = Capped(model.config)
    capped.lm_head.weight.data.normal_()
    expected = own_loss(capped, rows, "causal-lm", CPU)
    with pytest.raises(UserError, match="scales or caps its logits"):
        check_loss(
            capped, rows, "causal-lm", Layout(512, packed=False), expected, CPU, torch.float32
        )


def test_an_untrained_model_starts_at_the_loss_of_guessing():
    model, rows = tiny_llama(), make_rows()
    batch = collate_packed(rows, np.arange(len(rows)))
    mean = float(loss_sum(model, batch, torch.float32)) / len(batch.targets_N)
    # Weights of 0.02 give logits near 0: the loss is ln(97) but for a few hundredths.
    assert mean == pytest.approx(math.log(97), abs=0.1)
