"""Soft prompts: attended to, one cache for all rows, and refused where they cannot be."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from schemas.candidates import PrefixTuning, PromptTuning, PTuning
from schemas.errors import StageError, UserError
from tasks.methods import soft
from tasks.methods.method import trained
from tasks.methods.table import METHODS

V = 5
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.5,  # a wide draw, so that what is seen makes a difference
    "pad_token_id": 0,
    "num_labels": 3,
}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2)
CAUSAL = {
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    ),
}
CLASSES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            num_labels=3,
            initializer_range=0.5,
        )
    ),
    "llama": lambda: LlamaForSequenceClassification(LLAMA),
}
SOFT = [
    PromptTuning(method="prompt_tuning", virtual_tokens=V),
    PromptTuning(method="prompt_tuning", virtual_tokens=V, init="random"),
    PTuning(method="p_tuning", virtual_tokens=V),
    PTuning(method="p_tuning", virtual_tokens=V, encoder="lstm", hidden_size=12),
    PrefixTuning(method="prefix_tuning", virtual_tokens=V),
    PrefixTuning(method="prefix_tuning", virtual_tokens=V, projection=True, hidden_size=12),
]
IDS = ["prompt", "random", "mlp", "lstm", "prefix", "projected"]
soft_prompts = pytest.mark.parametrize("candidate", SOFT, ids=IDS)


def built(make: Any, candidate: Any, task: str) -> Any:
    torch.manual_seed(0)
    base = make().eval()
    return METHODS[candidate.method].build(base, candidate, task).eval()


def rows_of(lengths: list[int]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(1, 64, (length,)) for length in lengths]


def padded(rows: list[torch.Tensor], left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        start = width - len(row) if left else 0
        ids[index, start : start + len(row)] = row
        mask[index, start : start + len(row)] = 1
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left else {}
    return {"input_ids": ids, "attention_mask": mask, **places}


@soft_prompts
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("base", ["llama", "gpt2", "bert", "roberta", "electra", "distilbert"])
def test_what_learns_is_the_formula_on_every_kind_of_base(candidate, task, base):
    makes = CAUSAL if task == "causal-lm" else CLASSES
    if base not in makes or (base == "distilbert" and candidate.method == "prefix_tuning"):
        return
    method = METHODS[candidate.method]
    with torch.device("meta"):
        expected = method.trainable_parameters(makes[base](), candidate, task)
        on_meta = sum(w.numel() for w in trained(built(makes[base], candidate, task)).values())
    model = built(makes[base], candidate, task)
    assert sum(weight.numel() for weight in trained(model).values()) == expected == on_meta


def test_counts_by_hand():
    """Embeddings 32 wide, 2 layers, keys 2 heads of 8."""
    counts = [
        METHODS[candidate.method].trainable_parameters(CAUSAL["llama"](), candidate, "causal-lm")
        for candidate in SOFT
    ]
    one = 4 * (32 * 12 + 12 * 12 + 12 + 12)  # an LSTM's four gates, one direction
    two = 4 * (24 * 12 + 12 * 12 + 12 + 12)
    assert counts == [
        V * 32,
        V * 32,
        V * 32 + 3 * (32 * 32 + 32),
        V * 32 + 2 * one + 2 * two + (24 * 24 + 24) + (24 * 32 + 32),
        V * 2 * 2 * 16,
        V * 16 + (16 * 12 + 12) + (12 * 64 + 64),
    ]


def test_a_prompt_starts_from_the_vocabulary_that_the_seed_draws():
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        base = CAUSAL["llama"]()
        torch.manual_seed(seed)
        model: Any = METHODS["prompt_tuning"].build(base, SOFT[0], "causal-lm")
        start_VH = model.prompt_encoder["default"].embedding.weight.detach()
        table_NH = model.get_base_model().get_input_embeddings().weight
        assert all((table_NH == row_H).all(1).any() for row_H in start_VH)
        starts.append(start_VH)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@soft_prompts
@pytest.mark.parametrize("base", CAUSAL)
def test_rows_padded_on_the_left_give_what_peft_gives_each_alone(candidate, base):
    """And then token by token with the cache, against the whole row at once."""
    model = built(CAUSAL[base], candidate, "causal-lm")
    rows = rows_of([3, 9, 6])
    heads = [row[:-2] for row in rows]
    with torch.no_grad():
        alone = [model(input_ids=row[None]).logits[0, -len(row) :] for row in rows]
        plain = model.get_base_model()(input_ids=rows[1][None]).logits[0]
        inputs = padded(heads, left=True)
        output = soft.run(model, **inputs, use_cache=True)
        assert output.logits.shape[1] == max(map(len, heads))
        steps = [[output.logits[i, -len(h) :]] for i, h in enumerate(heads)]
        for place in (-2, -1):
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            inputs["position_ids"] = inputs["position_ids"][:, -1:] + 1
            inputs["input_ids"] = torch.stack([row[place] for row in rows])[:, None]
            output = soft.run(
                model, **inputs, past_key_values=output.past_key_values, use_cache=True
            )
            for index in range(len(rows)):
                steps[index].append(output.logits[index])
    for ours, theirs in zip(steps, alone, strict=True):
        # float32 sums over other shapes; the logits are of size 10.
        assert torch.allclose(torch.cat(ours), theirs, atol=1e-4)
    assert not torch.allclose(alone[1], plain, atol=0.1), "the virtual tokens are not attended to"


@soft_prompts
@pytest.mark.parametrize("base", CLASSES)
def test_a_padded_text_is_classified_as_it_is_alone(candidate, base):
    """PEFT's own forward is the reference, on one row, where it is exact."""
    if base == "distilbert" and candidate.method == "prefix_tuning":
        with pytest.raises(UserError, match=r"takes no keys and values[\s\S]*prompt_tuning"):
            built(CLASSES[base], candidate, "sequence-classification")
        return
    model = built(CLASSES[base], candidate, "sequence-classification")
    rows = rows_of([3, 9, 6])
    with torch.no_grad():
        together = soft.run(model, **padded(rows, left=False)).logits
        alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
        # float32 sums over other shapes; the logits are of size 5.
        assert torch.allclose(together, alone, atol=1e-5)
        weight = model.prompt_encoder["default"].embedding.weight
        weight += torch.randn_like(weight)
        assert not torch.allclose(
            soft.run(model, **padded(rows, left=False)).logits, alone, atol=1e-3
        )


@soft_prompts
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_what_is_saved_reloads_to_the_same_logits_with_its_head(tmp_path, candidate, task):
    make = CAUSAL["llama"] if task == "causal-lm" else CLASSES["bert"]
    model = built(make, candidate, task)
    with torch.no_grad():
        for weight in trained(model).values():
            weight += 0.1 * torch.randn_like(weight)
    inputs = padded(rows_of([4, 8]), left=task == "causal-lm")
    expected = soft.run(model, **inputs).logits
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(make().eval(), tmp_path).eval()
    assert soft.virtual_tokens(again) == V
    # The network that wrote them is gone; its output is the same bits.
    assert torch.equal(soft.run(again, **inputs).logits, expected)


@soft_prompts
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_run_ends_with_proof_that_the_prompt_is_attended_to(monkeypatch, candidate, task):
    """And leaves every weight as it was; a base that looks past the prompt is found out."""
    model = built(CAUSAL["llama"] if task == "causal-lm" else CLASSES["bert"], candidate, task)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    course = METHODS[candidate.method].course(model, candidate, 1)
    assert course.finish()["virtual_tokens_move_logits"] > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    monkeypatch.setattr(soft, "run", lambda model, **inputs: model.get_base_model()(**inputs))
    with pytest.raises(StageError, match="no row attends to the virtual tokens"):
        course.finish()


def test_bases_that_cannot_see_every_virtual_token_are_refused():
    window = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8))
    for candidate in SOFT:
        with pytest.raises(UserError, match=r"look back over a window[\s\S]*method: lora"):
            METHODS[candidate.method].build(copy.deepcopy(window), candidate, "causal-lm")


def test_rows_that_leave_no_room_for_virtual_tokens_are_refused():
    sizes = {**SIZES, "max_position_embeddings": 16}
    model = built(lambda: LlamaForCausalLM(LlamaConfig(**sizes)), SOFT[0], "causal-lm")
    soft.check_room(model, 11)
    with pytest.raises(UserError, match=r"12 tokens behind 5 virtual[\s\S]*max_length: 11"):
        soft.check_room(model, 12)
    # Its positions begin at 2.
    roberta = lambda: RobertaForSequenceClassification(RobertaConfig(**sizes))  # noqa: E731
    model = built(roberta, SOFT[0], "sequence-classification")
    with pytest.raises(UserError, match="max_length: 9"):
        soft.check_room(model, 10)


def test_a_width_without_its_network_is_refused():
    with pytest.raises(ValueError, match="`projection: true` alone"):
        PrefixTuning(method="prefix_tuning", hidden_size=8)
