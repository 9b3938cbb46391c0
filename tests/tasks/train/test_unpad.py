"""An encoder whose layers see no padding gives what it gave with it, and sees less."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaModel,
)

from tasks.train import attention
from tasks.train.unpad import unpad


@pytest.fixture(autouse=True)
def _registered() -> None:
    attention.register()


HEADS = [BertForSequenceClassification, BertForTokenClassification]


def bert(head=BertForSequenceClassification):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=1200,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = head(config)
    model.set_attn_implementation(attention.NAME)
    return model


@pytest.mark.parametrize("lengths", [[16, 7, 1], [70, 3, 3, 40], [9, 9], [1100, 5]])
@pytest.mark.parametrize("head", HEADS)
def test_logits_and_gradients_are_those_with_padding(lengths, head):
    """[9, 9] has no padding, 1,100 tokens go to PyTorch's own attention."""
    model = bert(head)
    ids = torch.randint(0, 100, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    results = []
    for way in ("padded", "unpadded"):
        if way == "unpadded":
            assert unpad(model.base_model)
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        if logits.ndim == 3:  # of every token: those of the padding are nobody's
            logits = logits[mask.bool()]
        logits.square().sum().backward()
        grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        results.append([logits.detach(), *grads])
    for ours, theirs in zip(results[1], results[0], strict=True):
        # float32 sums in another order; gradients are of size 1.
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)


def test_layers_see_real_tokens_only():
    model = bert()
    unpad(model.base_model)
    seen = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mask = (torch.arange(300) < torch.tensor([300] + [10] * 20)[:, None]).long()
    model(input_ids=torch.ones(21, 300, dtype=torch.long), attention_mask=mask)
    # 500 real tokens, filled up to a multiple of 64; padded it would be 6,300.
    assert seen[0].shape[:2] == (1, 512)


def test_a_stack_of_another_kind_is_left_alone():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    assert not unpad(LlamaModel(config))
