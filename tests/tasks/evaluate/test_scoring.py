"""Losses and class logits in padded batches against transformers' own, one row at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM

from tasks.evaluate import scoring
from tasks.evaluate.batches import by_length, left_padded

# float32 sums in another order: padding changes the blocking of the products. Losses here are
# near 9 nats a token, where float32 has 1e-6, and a row has some twenty tokens.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def model(causal) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(causal.paths["base"]).eval()


def own_losses(model: torch.nn.Module, rows) -> np.ndarray:
    """transformers' mean loss of each unpadded row, times its tokens, [N]."""
    losses = []
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.row(index)[None].astype(np.int64))
        learned = torch.from_numpy(rows.mask(index)[None].astype(bool))
        with torch.no_grad():
            mean = model(input_ids=ids, labels=torch.where(learned, ids, -100)).loss
        losses.append(float(mean) * int(learned[:, 1:].sum()))
    return np.array(losses)


@pytest.mark.parametrize("max_tokens", [1, 200, 8192])
def test_loss_is_transformers_own(causal, model, monkeypatch, max_tokens: int) -> None:
    monkeypatch.setattr(scoring, "BATCH_TOKENS", max_tokens)
    rows = causal.test_rows
    loss, tokens = scoring.answer_losses(model, rows, "loss")
    np.testing.assert_allclose(loss, own_losses(model, rows), **TOLERANCE)
    assert tokens.tolist() == [int(rows.mask(index).sum()) for index in range(len(rows))]


def test_a_rows_first_token_is_never_scored(causal, model) -> None:
    rows = causal.test_rows
    every = replace(rows, loss_mask=np.ones_like(rows.loss_mask))
    loss, tokens = scoring.answer_losses(model, every, "loss")
    assert tokens.tolist() == (rows.lengths - 1).tolist()
    np.testing.assert_allclose(loss, own_losses(model, every), **TOLERANCE)


def test_a_model_that_cannot_leave_out_logits(causal, model) -> None:
    class Plain(torch.nn.Module):
        """The same model behind a forward pass of the old kind."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.config = model.config

        def forward(self, input_ids, attention_mask, position_ids):
            return self.inner(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )

    fast, _ = scoring.answer_losses(model, causal.test_rows, "loss")
    plain, _ = scoring.answer_losses(Plain(), causal.test_rows, "loss")
    np.testing.assert_allclose(plain, fast, **TOLERANCE)


def test_class_logits_do_not_depend_on_the_batch(classes) -> None:
    model = BertForSequenceClassification.from_pretrained(classes.paths["base"]).eval()
    rows = classes.test_rows
    together = scoring.class_logits(model, rows, "classify")
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.row(index)[None].astype(np.int64))
        with torch.no_grad():
            alone = model(input_ids=ids).logits[0].numpy()
        # Logits are below 1; float32 sums in another order differ in the seventh digit.
        np.testing.assert_allclose(together[index], alone, atol=2e-6)


def test_groups_hold_every_row_once_and_keep_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 300)
    lengths[7] = 500
    groups = by_length(lengths, max_tokens=400, max_rows=20)
    assert sorted(np.concatenate(groups).tolist()) == list(range(300))
    for group in groups:
        assert len(group) == 1 or len(group) * lengths[group].max() <= 400
        assert len(group) <= 20
    padded = sum(len(group) * lengths[group].max() for group in groups)
    assert padded <= 1.2 * lengths.sum()  # ungrouped batches of twenty would pad by half


def test_left_padding_keeps_each_rows_own_positions() -> None:
    inputs = left_padded([np.array([5, 6, 7]), np.array([8])], pad_id=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
