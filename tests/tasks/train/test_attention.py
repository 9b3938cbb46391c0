"""Our CPU attention is the model's own, and packed rows do not see each other."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tasks.core.tokens import TokenRows
from tasks.train import attention, grids
from tasks.train.batching import collate_packed


@pytest.fixture(autouse=True)
def _registered() -> None:
    attention.register()


def llama() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    return LlamaModel(config).eval()


def make_rows(lengths: list[int]) -> TokenRows:
    ids = np.random.default_rng(0).integers(0, 500, sum(lengths)).astype(np.int32)
    return TokenRows(
        input_ids=ids,
        offsets=np.cumsum([0, *lengths]),
        source_rows=np.arange(len(lengths)),
        loss_mask=np.ones(len(ids), dtype=np.uint8),
    )


def packed_hidden(model: LlamaModel, rows: TokenRows) -> torch.Tensor:
    batch = collate_packed(rows, np.arange(len(rows)))
    return model(
        input_ids=batch.input_ids_BL,
        position_ids=batch.position_ids_BL,
        cu_seq_lens_q=batch.row_ends,
        use_cache=False,
    ).last_hidden_state[0]


@pytest.mark.parametrize("own", [False, True], ids=["ours", "transformers"])
def test_packed_rows_do_not_see_each_other(own):
    """Changing one packed row leaves the others' hidden states as they were, bit for bit."""
    model = llama()
    if not own:
        model.set_attn_implementation(attention.NAME)
    rows, changed = make_rows([5, 9, 7]), make_rows([5, 9, 7])
    changed.input_ids[5:14] = (changed.input_ids[5:14] + 1) % 500
    with torch.no_grad():
        first, second = packed_hidden(model, rows), packed_hidden(model, changed)
    assert torch.equal(first[:5], second[:5])
    assert torch.equal(first[14:21], second[14:21])
    assert not torch.allclose(first[5:14], second[5:14])


@pytest.mark.parametrize("lengths", [[5, 9, 7], [1, 40, 33], [1100, 3]])
def test_packed_rows_are_what_they_are_alone(lengths):
    """Also where a row is longer than what the products take (1,024)."""
    model = llama()
    rows = make_rows(lengths)
    alone = [model(torch.from_numpy(rows.row(i).astype(np.int64))[None]) for i in range(len(rows))]
    expected = torch.cat([output.last_hidden_state[0] for output in alone])
    model.set_attn_implementation(attention.NAME)
    got = packed_hidden(model, rows)[: len(expected)]
    # float32 sums in another order: hidden states are of size 1.
    assert torch.allclose(got, expected, atol=1e-4)


def test_padding_is_not_looked_at_in_either_direction():
    """BERT with a padding mask, against transformers' own attention: outputs and gradients."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertModel(config).eval()
    ids = torch.randint(0, 100, (3, 16))
    mask = (torch.arange(16) < torch.tensor([16, 7, 1])[:, None]).long()
    results = []
    for name in ("sdpa", attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        hidden.square().sum().backward()
        gradient = model.embeddings.word_embeddings.weight.grad.clone()
        results.append((hidden.detach(), gradient))
    for ours, theirs in zip(results[1], results[0], strict=True):
        # float32 rounding; gradients are of size 10.
        assert torch.allclose(ours, theirs, atol=2e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_the_product_and_its_gradients_are_softmax_attention(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, 24, 8, requires_grad=True) for _ in range(3))
    bias = torch.full((1, 24, 24), float("-inf")).triu_(1) if causal else None
    ours = attention.Attention.apply(q, k, v, bias, 0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    grad = torch.randn_like(ours)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), grad)),
        (theirs, *torch.autograd.grad(theirs, (q, k, v), grad)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=12),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([0, 1 << 22]),
)
def test_packed_rows_attend_as_they_would_alone(lengths, heads, worth):
    """Slow reference: each row alone through PyTorch's attention, outputs and gradients.

    `worth` 0 makes a grid of every padded length, the default value one or two of all.
    """
    queries, keys = heads
    torch.manual_seed(0)
    total, width = sum(lengths), 8
    q = torch.randn(1, queries, total, width, requires_grad=True)
    k, v = (torch.randn(1, keys, total, width, requires_grad=True) for _ in range(2))
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with mock.patch.object(grids, "WORTH_A_GRID", worth):
        ours = attention._packed(q, k, v, ends, 0.3)
    rows = [
        F.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=True)
        for parts in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
    ]
    theirs = torch.cat(rows, 2)[0].transpose(0, 1)
    grad = torch.randn_like(ours)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), grad)),
        (theirs, *torch.autograd.grad(theirs, (q, k, v), grad)),
        strict=True,
    ):
        # float32 sums of up to 150 terms of size 1 in another order.
        assert torch.allclose(a, b, atol=2e-5)


def test_packed_rows_of_several_grids_train_under_gradient_checkpointing():
    """A checkpoint hands out what was saved once. The gradients are those without it."""
    rows, gradients = make_rows([5, 300, 9, 700]), []
    for checkpointing in (False, True):
        model = llama().train()
        model.set_attn_implementation(attention.NAME)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with mock.patch.object(grids, "WORTH_A_GRID", 0):
            packed_hidden(model, rows).square().sum().backward()
        gradients.append(model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


@given(st.lists(st.integers(0, 700), min_size=1, max_size=40).filter(any))
def test_grids_hold_every_token_of_every_head_once(lengths):
    """Their shapes too: few of them, and rows no shorter than the grid says."""
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    made = grids.grids(ends, 2, 1, 64)
    real = [grid.queries[grid.real_N1[:, 0]] for grid in made.grids]
    assert sorted(torch.cat(real).tolist()) == list(range(2 * sum(lengths)))
    assert all(grid.length % grids.ALIGN == 0 for grid in made.grids)
    assert sum(grid.rows for grid in made.grids) <= 4 / 3 * len(lengths) + len(made.grids)
    cells = torch.cat([grid.queries for grid in made.grids])
    assert torch.equal(cells[made.place_TH], torch.arange(2 * sum(lengths)))
