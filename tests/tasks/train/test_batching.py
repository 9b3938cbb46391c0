"""Every row exactly once an epoch, the same on every run, and rows that never see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import UserError
from tasks.core.tokens import TokenRows
from tasks.train.batching import Plan, answer_tokens, collate, collate_packed, micro_batches

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(np.array)


def make_rows(lengths: np.ndarray, seed: int = 0) -> TokenRows:
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    mask = random.integers(0, 2, offsets[-1]).astype(np.uint8)
    mask[offsets[1:] - 1] = 1
    return TokenRows(
        input_ids=random.integers(3, 500, offsets[-1]).astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(len(lengths)) + 1,
        loss_mask=mask,
        labels=random.integers(0, 5, len(lengths)),
    )


@given(LENGTHS, st.integers(1, 400), st.integers(0, 5), st.integers(0, 3))
def test_every_row_once_an_epoch_and_the_same_again(lengths, batch_tokens, seed, epoch):
    plan = Plan(lengths, batch_tokens, seed)
    steps = plan.epoch(epoch)
    assert sorted(np.concatenate(steps)) == list(range(len(lengths)))
    assert len(steps) == plan.steps_per_epoch
    assert all(len(step) > 0 for step in steps)
    again = Plan(lengths, batch_tokens, seed).epoch(epoch)
    assert all(np.array_equal(a, b) for a, b in zip(steps, again, strict=True))


@given(LENGTHS, st.integers(60, 600))
def test_a_step_has_about_batch_tokens(lengths, batch_tokens):
    # A cut falls at most one row away from its share; the share is within a factor of the
    # rounding of the number of steps (a half of at least one step).
    plan = Plan(lengths, batch_tokens, 0)
    share = lengths.sum() / plan.steps_per_epoch
    for step in plan.epoch(0):
        assert abs(lengths[step].sum() - share) <= 2 * lengths.max()


def test_epochs_and_seeds_shuffle_differently():
    lengths = np.full(50, 10)
    orders = {
        tuple(np.concatenate(Plan(lengths, 100, seed).epoch(epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@given(LENGTHS, st.integers(1, 300))
def test_micro_batches_keep_every_row_and_the_budget(lengths, budget):
    rows = np.random.default_rng(0).permutation(len(lengths))
    parts = micro_batches(rows, lengths, budget)
    assert sorted(np.concatenate(parts)) == sorted(rows)
    for part in parts:
        padded = int(lengths[part].max()) * len(part)
        assert padded <= budget or len(part) == 1


@settings(deadline=None)
@given(LENGTHS)
def test_a_batch_is_its_rows_padded(lengths):
    rows = make_rows(lengths)
    index = np.random.default_rng(1).permutation(len(lengths))
    batch = collate(rows, index, "sequence-classification", pad_id=2)
    longest = int(lengths.max())
    for line, row in enumerate(index):
        expected = np.full(longest, 2)
        expected[: lengths[row]] = rows.row(row)
        assert np.array_equal(batch.input_ids_BL[line].numpy(), expected)
        if batch.attention_mask_BL is not None:
            assert batch.attention_mask_BL[line].sum() == lengths[row]
    assert (batch.attention_mask_BL is None) == bool((lengths == longest).all())
    assert batch.targets_N.tolist() == rows.labels[index].tolist()
    assert batch.tokens == lengths.sum()


@settings(deadline=None)
@given(LENGTHS)
def test_learned_tokens_are_those_of_the_mask_padded_or_packed(lengths):
    """Slow reference: walk each row and pair every learned token with the one before it."""
    rows = make_rows(lengths)
    index = np.arange(len(lengths))
    expected = [
        (int(rows.row(row)[at - 1]), int(rows.row(row)[at]))
        for row in index
        for at in range(1, lengths[row])
        if rows.mask(row)[at]
    ]
    for batch in (collate(rows, index, "causal-lm", 0), collate_packed(rows, index)):
        before = batch.input_ids_BL.flatten()[batch.predict_N]
        assert list(zip(before.tolist(), batch.targets_N.tolist(), strict=True)) == expected


def test_answer_tokens_counts_what_can_be_learned_and_refuses_rows_without():
    lengths = np.array([3, 4])
    rows = make_rows(lengths)
    rows.loss_mask[:] = [1, 0, 1, 0, 1, 1, 1]
    # The first token of a row has nothing before it to be predicted from.
    assert answer_tokens(rows, "causal-lm").tolist() == [1, 3]
    assert answer_tokens(rows, "sequence-classification").tolist() == [1, 1]
    rows.loss_mask[:3] = 0
    with pytest.raises(UserError, match="row 1: no token to learn"):
        answer_tokens(rows, "causal-lm")


def test_packed_rows_do_not_see_each_other():
    """Changing one packed row leaves the hidden states of the others as they were, bit for bit."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaModel(config).eval()
    rows = make_rows(np.array([5, 9, 7]))
    changed = make_rows(np.array([5, 9, 7]))
    changed.input_ids[5:14] = (changed.input_ids[5:14] + 1) % 500

    def hidden(rows: TokenRows) -> torch.Tensor:
        batch = collate_packed(rows, np.arange(3))
        with torch.no_grad():
            return model(
                input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, use_cache=False
            ).last_hidden_state[0]

    first, second = hidden(rows), hidden(changed)
    assert torch.equal(first[:5], second[:5])
    assert torch.equal(first[14:], second[14:])
    assert not torch.allclose(first[5:14], second[5:14])
    # And each packed row is what it is alone, up to the order of float32 sums.
    with torch.no_grad():
        alone = model(torch.from_numpy(rows.row(2).astype(np.int64))[None]).last_hidden_state[0]
    assert torch.allclose(first[14:], alone, atol=1e-5)
