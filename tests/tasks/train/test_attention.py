"""Our CPU attention is the model's own, and packed rows do not see each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tasks.core.tokens import TokenRows
from tasks.train import attention
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
