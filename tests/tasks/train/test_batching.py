"""Every row exactly once an epoch, the same on every run, and rows that never see each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import UserError
from tasks.core.plan import Plan
from tasks.core.tokens import TokenRows
from tasks.train.batching import (
    IGNORED,
    TOKEN_ALIGN,
    Layout,
    answer_tokens,
    collate,
    collate_packed,
    micro_batches,
)

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


@given(LENGTHS, st.integers(1, 300), st.booleans())
def test_cutting_a_step_keeps_every_row_and_the_budget(lengths, budget, packed):
    rows = np.random.default_rng(0).permutation(len(lengths))
    parts = micro_batches(rows, lengths, Layout(budget, packed))
    assert sorted(np.concatenate(parts)) == sorted(rows)
    for part in parts:
        padded = lengths[part].sum() if packed else int(lengths[part].max()) * len(part)
        assert padded <= budget or len(part) == 1


def test_packs_are_about_equal():
    # Snake dealing pairs long rows with short ones: with many rows no pack has more than one
    # longest row above the others.
    lengths = np.random.default_rng(0).integers(20, 400, 64)
    parts = micro_batches(np.arange(64), lengths, Layout(int(lengths.sum()) // 3, packed=True))
    assert len(parts) == 4
    tokens = [int(lengths[part].sum()) for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max()


@settings(deadline=None)
@given(LENGTHS)
def test_a_batch_is_its_rows_padded(lengths):
    rows = make_rows(lengths)
    index = np.random.default_rng(1).permutation(len(lengths))
    batch = collate(rows, index, "sequence-classification", pad_id=2)
    width = batch.input_ids_BL.shape[1]
    assert lengths.max() <= width < lengths.max() + 8
    for line, row in enumerate(index):
        expected = np.full(width, 2)
        expected[: lengths[row]] = rows.row(row)
        assert np.array_equal(batch.input_ids_BL[line].numpy(), expected)
        if batch.attention_mask_BL is not None:
            assert batch.attention_mask_BL[line].sum() == lengths[row]
    if batch.attention_mask_BL is None:
        assert (lengths == width).all()
    assert batch.targets_N[: len(index)].tolist() == rows.labels[index].tolist()
    # What only fills the batch counts for nothing.
    assert (batch.targets_N[len(index) :] == IGNORED).all()
    assert batch.tokens == lengths.sum()


@settings(deadline=None)
@given(LENGTHS)
def test_labels_of_tokens_stand_where_their_tokens_do(lengths):
    """Slow reference: walk each row. The first token of each has no label."""
    lengths = lengths + 1
    rows = make_rows(lengths)
    labels = np.arange(len(rows.input_ids), dtype=np.int32) % 5
    labels[rows.offsets[:-1]] = IGNORED
    rows = dataclasses.replace(rows, labels=None, token_labels=labels)
    batch = collate(rows, np.arange(len(lengths)), "token-classification", pad_id=2)
    assert batch.targets_N.shape == (batch.input_ids_BL.numel(),)
    found = batch.targets_N.view(batch.input_ids_BL.shape)
    for line in range(len(found)):
        expected = np.full(found.shape[1], IGNORED)
        if line < len(lengths):
            expected[: lengths[line]] = labels[rows.place(line)]
        assert np.array_equal(found[line].numpy(), expected)
    assert answer_tokens(rows, "token-classification").tolist() == [n - 1 for n in lengths]


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


@settings(deadline=None)
@given(LENGTHS)
def test_packed_rows_start_at_zero_and_end_where_it_is_said(lengths):
    batch = collate_packed(make_rows(lengths), np.arange(len(lengths)))
    ends = batch.row_ends.tolist()
    total = batch.input_ids_BL.shape[1]
    assert ends[: len(lengths) + 1] == [0, *np.cumsum(lengths)]
    assert ends[-1] == total
    assert total % TOKEN_ALIGN == 0
    expected = np.concatenate([np.arange(n) for n in np.diff(ends)])
    assert np.array_equal(batch.position_ids_BL[0].numpy(), expected)
