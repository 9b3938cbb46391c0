"""Training behind virtual tokens: the loss and the gradients of PEFT's own forward, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
)

from schemas.candidates import Lora, PrefixTuning, PromptTuning, PTuning
from schemas.errors import UserError
from schemas.stages import TrainSpec
from schemas.together import Together
from tasks.core.tokens import TokenRows
from tasks.methods import soft
from tasks.methods.method import trained
from tasks.methods.table import METHODS
from tasks.train import attention, stage
from tasks.train.batching import Layout, collate, collate_packed, micro_batches
from tasks.train.loss import backbone, hidden_states, loss_sum
from tasks.train.norm import fuse_norms
from tasks.train.probe import check_packed_apart, probe_rows
from tasks.train.rotary import fuse_rotary
from tasks.train.unpad import unpad
from tasks.train.virtual import places

V = 5
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,  # a wide draw, so that what is seen makes a difference
    "max_position_embeddings": 1200,
    "pad_token_id": 0,
}
CAUSAL = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    # Turns half of each head, and has biases and a norm of another kind.
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
}
CLASSES = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**SIZES, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "llama": lambda: LlamaForSequenceClassification(
        LlamaConfig(**SIZES, num_key_value_heads=2, num_labels=3)
    ),
}
SOFT = {
    "prompt": PromptTuning(method="prompt_tuning", virtual_tokens=V),
    "mlp": PTuning(method="p_tuning", virtual_tokens=V),
    "lstm": PTuning(method="p_tuning", virtual_tokens=V, encoder="lstm", hidden_size=12),
    "prefix": PrefixTuning(method="prefix_tuning", virtual_tokens=V),
    "projected": PrefixTuning(method="prefix_tuning", virtual_tokens=V, projection=True),
    "with lora": Together(
        method="together",
        of=[
            Lora(method="lora", rank=4),
            PrefixTuning(method="prefix_tuning", virtual_tokens=V, projection=True),
        ],
    ),
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    attention.register()


def built(make: Any, name: str, task: str) -> Any:
    torch.manual_seed(0)
    base = make().eval()
    model = METHODS[SOFT[name].method].build(base, SOFT[name], task).eval()
    with torch.no_grad():
        for part, weight in trained(model).items():
            if ".lora_B." in part:  # of zeros A would learn nothing
                weight.normal_(std=0.1)
    return model


def token_rows(lengths: list[int], labels: bool = False) -> TokenRows:
    draw = np.random.default_rng(0)
    ids = draw.integers(1, 64, sum(lengths)).astype(np.int32)
    return TokenRows(
        input_ids=ids,
        offsets=np.cumsum([0, *lengths]),
        source_rows=np.arange(len(lengths)),
        loss_mask=draw.integers(0, 2, len(ids)).astype(np.uint8) | (np.arange(len(ids)) % 2 == 0),
        labels=np.arange(len(lengths)) % 3 if labels else None,
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    grads = {name: weight.grad.clone() for name, weight in trained(model).items()}
    model.zero_grad(set_to_none=True)
    return grads


def by_peft(model: Any, rows: TokenRows, task: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The reference: PEFT's own forward, one unpadded row at a time, transformers' attention."""
    total = 0.0
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.row(index).astype(np.int64))[None]
        logits = model(input_ids=ids).logits
        if task == "causal-lm":
            learned = torch.from_numpy(rows.mask(index).astype(bool))[1:]
            own = logits[0, -ids.shape[1] : -1]
            loss = F.cross_entropy(own[learned], ids[0, 1:][learned], reduction="sum")
        else:
            assert rows.labels is not None
            loss = F.cross_entropy(logits, torch.tensor([int(rows.labels[index])]))
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def check(model: Any, batch: Any, expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    loss = loss_sum(model, batch, torch.float32)
    loss.backward()
    # float32: the same sums in another order, over some hundred terms.
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    for name, grad in gradients(model).items():
        scale = expected[1][name].abs().max()
        assert scale > 0, name
        assert torch.allclose(grad, expected[1][name], atol=1e-4 * float(scale)), name


@pytest.mark.parametrize(
    ("base", "name", "lengths"),
    [
        *((base, name, [3, 9, 17, 2, 30, 11]) for base in CAUSAL for name in SOFT),
        *(("llama", name, [1, 40]) for name in SOFT),
        ("llama", "prompt", [attention.LONGEST, 4]),
        ("phi", "prefix", [attention.LONGEST, 4]),
    ],
)
def test_packed_rows_learn_what_peft_has_them_learn_alone(base, name, lengths):
    """With the fused layers, and again with gradient checkpointing; the last lengths go to
    PyTorch's own attention, as with its virtual tokens a row is longer than ours takes."""
    model = built(CAUSAL[base], name, "causal-lm")
    rows = token_rows(lengths)
    expected = by_peft(model, rows, "causal-lm")
    unpacked = collate(rows, np.arange(len(rows)), "causal-lm", 0)
    check(model, unpacked, expected)

    model.get_base_model().set_attn_implementation(attention.NAME)
    fuse_norms(model)
    fuse_rotary(model)
    batch = collate_packed(rows, np.arange(len(rows)))
    check(model, batch, expected)
    # Row by row behind the cache, under our attention with a mask.
    check(model, unpacked, expected)
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    check(model, batch, expected)


@pytest.mark.parametrize("name", SOFT)
def test_packed_rows_do_not_see_each_other_and_do_see_the_virtual_tokens(name):
    model = built(CAUSAL["llama"], name, "causal-lm")
    model.get_base_model().set_attn_implementation(attention.NAME)
    rows = probe_rows(token_rows([9, 17]))
    check_packed_apart(model, rows, CPU)
    batch = collate_packed(rows, np.arange(2))
    with torch.no_grad():
        before = hidden_states(model, batch)
        weight = model.prompt_encoder["default"].embedding.weight
        weight += torch.randn_like(weight)
        after = hidden_states(model, batch)
    assert (before - after).abs().amax(1).min() > 1e-3, "every real token looks at them"


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("base", CLASSES)
def test_padded_texts_learn_what_peft_has_them_learn_alone(base, name):
    """An encoder without its padding, where it can do without; a decoder with our attention."""
    model = built(CLASSES[base], name, "sequence-classification")
    rows = token_rows([3, 9, 17, 2], labels=True)
    expected = by_peft(model, rows, "sequence-classification")
    assert ("pooler" in str(expected[1].keys())) == (base == "bert")
    model.get_base_model().set_attn_implementation(attention.NAME)
    model.train()
    batch = collate(rows, np.arange(4), "sequence-classification", 0)
    check(model, batch, expected)
    if base == "bert" and not soft.is_cache(model):
        assert unpad(backbone(model))
        check(model, batch, expected)


def test_places_are_there_and_back():
    where = places(torch.tensor([0, 2, 5], dtype=torch.int32), 2)
    # Virtual tokens 0 and 1, real ones from 2 on, in front of each row.
    assert where.source_P.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    assert where.row_ends.tolist() == [0, 4, 9]
    assert where.real_T.tolist() == [2, 3, 6, 7, 8]
    assert where.virtual_RV.tolist() == [0, 1, 4, 5]


def test_virtual_tokens_of_an_encoder_count_in_the_budget_of_a_micro_batch():
    lengths = np.full(12, 10)
    for virtual, most in ((0, 4), (10, 2)):
        parts = micro_batches(np.arange(12), lengths, Layout(40, False, virtual=virtual))
        assert max(map(len, parts)) == most


def job_of(name: str, base: str, task: str, **train: Any) -> Any:
    make = CAUSAL[base] if task == "causal-lm" else CLASSES[base]
    spec = TrainSpec.model_validate(
        {
            "task": task,
            "candidate": SOFT[name].model_dump(),
            "train": {"learning_rate": 1e-3, **train},
            "dtype": "float32",
        }
    )
    rows = token_rows([3, 9, 17, 2, 30, 11], labels=task != "causal-lm")
    labels = ["a", "b", "c"] if task != "causal-lm" else None
    return stage.prepare_job(spec, rows, labels, built(make, name, task), 0)


@pytest.mark.parametrize("name", SOFT)
def test_checkpointing_is_refused_where_it_would_drop_the_virtual_tokens(name):
    again: Any = {"gradient_checkpointing": True}
    assert job_of(name, "llama", "causal-lm", **again).layout.packed
    for base in CLASSES:
        task = "sequence-classification"
        job = job_of(name, base, task)
        if base == "bert" and name not in ("prefix", "projected", "with lora"):
            assert (job.layout.virtual, job.layout.unpadded) == (V, True)
            job_of(name, base, task, **again)
            continue
        assert (job.layout.virtual, job.layout.unpadded) == (0, False)
        with pytest.raises(UserError, match=r"train\.gradient_checkpointing: true, but layers"):
            job_of(name, base, task, **again)
