"""Encoder-decoders: the loss of a padded batch is transformers' own of each row by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, BartConfig, MT5Config, T5Config, UMT5Config

from schemas.candidates import PrefixTuning, PromptTuning, PTuning
from schemas.errors import UserError
from schemas.recipe import Train
from tasks.core.models import decoder_start
from tasks.core.tokens import TokenRows
from tasks.methods.method import trained
from tasks.methods.table import METHODS
from tasks.train import placement
from tasks.train.batching import Layout, answer_tokens, micro_batches
from tasks.train.loss import loss_sum
from tasks.train.pairs import batch_of, collate_pairs, held_lengths
from tasks.train.probe import check_loss, own_loss, probe_rows

CPU = torch.device("cpu")
T5 = {
    "vocab_size": 97,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": 97,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
SOFT = [
    PromptTuning(method="prompt_tuning", virtual_tokens=5),
    PTuning(method="p_tuning", virtual_tokens=5),
    PrefixTuning(method="prefix_tuning", virtual_tokens=5),
]
CONFIGS = {
    "t5": T5Config(**T5),
    "t5 v1.1": T5Config(**T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "mt5": MT5Config(**T5),
    "umt5": UMT5Config(**T5),
    "bart": BartConfig(**BART, activation_dropout=0.1),
}


def pairs(count: int = 12, seed: int = 0) -> TokenRows:
    draw = np.random.default_rng(seed)
    sources, targets = draw.integers(1, 30, count), draw.integers(1, 20, count)
    offsets = np.concatenate([[0], np.cumsum(sources + targets)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sources + targets)
    return TokenRows(
        input_ids=draw.integers(3, 97, offsets[-1]).astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(count) + 1,
        loss_mask=(place >= np.repeat(sources, sources + targets)).astype(np.uint8),
        answer_start=sources,
    )


def new_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind])
    for name, weight in model.named_parameters():
        if "embed" not in name and "shared" not in name:  # larger: attention that tells rows apart
            weight.data = weight.data + 0.2 * torch.randn_like(weight)
    return model


def layout_of(model: torch.nn.Module, budget: int = 10_000) -> Layout:
    return Layout(budget, packed=False, pad_id=1, start_id=decoder_start(model.config))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_padded_batch_is_each_row_alone_and_transformers_own_loss(kind):
    """Values and gradients, with the dropout of the base off although the model trains."""
    model, rows = new_model(kind), pairs()
    theirs = torch.zeros(())
    model.eval()
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.row(index).astype(np.int64))[None]
        cut = int(rows.answer_start[index])
        labels = ids[:, cut:]
        theirs = theirs + model(ids[:, :cut], labels=labels).loss * labels.numel()
    wanted = torch.autograd.grad(theirs, list(model.parameters()))

    placement.place(model, Train(), CPU)
    assert model.training
    batch = batch_of(rows, np.arange(len(rows)), "seq2seq", layout_of(model))
    ours = loss_sum(model, batch, torch.float32)
    # Sums of float32 in another order, over some 100 tokens.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    got = torch.autograd.grad(ours, list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_fused_lora_in_both_stacks_learns_what_pefts_own_would(kind):
    """Cross-attention reads the encoder for keys and values and the decoder for queries: layers
    of one module that do not share their input."""
    rows, grads, losses = pairs(), [], []
    for fused in (False, True):
        config = LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules="all-linear", r=4)
        model = get_peft_model(new_model(kind), config)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = 0.1 * torch.randn_like(weight)
        if fused:
            placement.place(model, Train(gradient_checkpointing=True), CPU)
        batch = batch_of(rows, np.arange(len(rows)), "seq2seq", layout_of(model.get_base_model()))
        model.train(fused)
        with torch.no_grad():  # fused layers learn here who shares an input
            loss_sum(model, batch, torch.float32)
        losses.append(loss_sum(model, batch, torch.float32))
        learned = [weight for weight in model.parameters() if weight.requires_grad]
        grads.append(torch.autograd.grad(losses[-1], learned))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-3)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("candidate", SOFT, ids=lambda candidate: candidate.method)
def test_a_soft_prompt_learns_what_pefts_own_forward_would(kind, candidate):
    """Of padded pairs, against PEFT's loss of each by itself: values and gradients."""
    rows = pairs()
    model: Any = METHODS[candidate.method].build(new_model(kind), candidate, "seq2seq")
    learned = list(trained(model).values())
    theirs = torch.zeros(())
    placement.place(model, Train(), CPU)
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.row(index).astype(np.int64))[None]
        cut = int(rows.answer_start[index])
        labels = ids[:, cut:]
        theirs = theirs + model(input_ids=ids[:, :cut], labels=labels).loss * labels.numel()
    wanted = torch.autograd.grad(theirs, learned)
    batch = batch_of(rows, np.arange(len(rows)), "seq2seq", layout_of(model.get_base_model()))
    ours = loss_sum(model, batch, torch.float32)
    # Sums of float32 in another order, over some 100 tokens.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    for one, other in zip(torch.autograd.grad(ours, learned), wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-3)


def test_a_prompts_tokens_count_before_sources_alone():
    """Towards what a micro-batch holds: its rows times the longest prompted source and target."""
    rows = pairs(40)
    lengths = held_lengths(rows, "seq2seq")
    layout = Layout(300, packed=False, virtual=20)
    parts = micro_batches(np.arange(40), lengths, layout)
    plain = micro_batches(np.arange(40), lengths, Layout(300, packed=False))
    assert sorted(np.concatenate(parts)) == list(range(40))
    for part in parts:
        source, target = lengths[part].max(axis=0)
        assert len(part) == 1 or len(part) * (source + 20 + target) <= 300
    assert len(parts) > len(plain)


@pytest.mark.parametrize("budget", [60, 200, 10_000])
def test_micro_batches_keep_to_the_budget_of_both_paddings(budget):
    rows = pairs(40)
    lengths = held_lengths(rows, "seq2seq")
    parts = micro_batches(np.arange(40), lengths, Layout(budget, packed=False))
    assert sorted(np.concatenate(parts)) == list(range(40))
    for part in parts:
        held = (lengths[part, 0].max() + lengths[part, 1].max()) * len(part)
        assert held <= budget or len(part) == 1


def test_the_decoder_reads_the_target_one_place_behind():
    rows = pairs(2)
    batch = collate_pairs(rows, np.arange(2), pad_id=1, start_id=0)
    for index in range(2):
        target = rows.row(index)[rows.answer_start[index] :]
        read = batch.decoder_input_ids_BD[index]
        assert read[: len(target)].tolist() == [0, *target[:-1]]
        assert (read[len(target) :] == 1).all()
    everything = np.concatenate([rows.row(i)[rows.answer_start[i] :] for i in range(2)])
    assert batch.targets_N.tolist() == everything.tolist()
    assert batch.tokens == len(rows.input_ids)
    assert answer_tokens(rows, "seq2seq").sum() == len(everything)


def test_a_base_that_adds_to_its_logits_is_refused():
    """As Marian's final_logits_bias does."""
    model, rows = new_model("bart").eval(), probe_rows(pairs())
    layout = layout_of(model)
    expected = own_loss(model, rows, "seq2seq", CPU)
    check_loss(model, rows, "seq2seq", layout, expected, CPU, torch.float32)
    model.final_logits_bias.normal_()
    expected = own_loss(model, rows, "seq2seq", CPU)
    with pytest.raises(UserError, match="its loss in a way"):
        check_loss(model, rows, "seq2seq", layout, expected, CPU, torch.float32)
    other = dataclasses.replace(layout, start_id=5)
    with pytest.raises(UserError, match="its loss in a way"):
        check_loss(model, rows, "seq2seq", other, expected, CPU, torch.float32)


def test_a_base_without_a_start_token_is_refused():
    with pytest.raises(UserError, match="decoder_start_token_id"):
        decoder_start(T5Config(**{**T5, "decoder_start_token_id": None}))
