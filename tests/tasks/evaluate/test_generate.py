"""Batched greedy answers against one prompt at a time, and against transformers' generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tasks.core.stops import stop_ids
from tasks.evaluate import generate as module
from tasks.evaluate.generate import generate

NEW_TOKENS = 16
STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="module")
def model(causal) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(causal.paths["base"]).eval()


@pytest.fixture(scope="module")
def prompts(causal) -> list[np.ndarray]:
    rows = causal.test_rows
    return [rows.row(index)[: rows.answer_start[index]] for index in range(len(rows))]


def alone(model, prompts, stops, new_tokens: int) -> list[list[int]]:
    """transformers' own greedy answer to each unpadded prompt, without its stop token."""
    answers = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        end = next((place for place, token in enumerate(output) if token in stops), len(output))
        answers.append(output[:end])
    return answers


@pytest.fixture(scope="module")
def references(model, prompts) -> dict[frozenset[int], list[list[int]]]:
    """Answers without a stop, and with stops that this random model does write here and there."""
    free = alone(model, prompts, frozenset(), NEW_TOKENS)
    stops = frozenset({free[0][3], free[2][7], free[5][1]})
    return {frozenset(): free, stops: alone(model, prompts, stops, NEW_TOKENS)}


@pytest.mark.parametrize("rows", [1, 4, 128])
def test_batched_equals_one_by_one(model, prompts, references, monkeypatch, rows: int) -> None:
    """Token by token in float32, over batches with and without rows that end early."""
    monkeypatch.setattr(module, "GENERATE_ROWS", rows)
    for stops, reference in references.items():
        answers = generate(model, prompts, stops, NEW_TOKENS)
        assert [answer.tokens for answer in answers] == reference
    written = {len(answer.tokens) for answer in answers}
    assert len(written) > 3, "rows must end at different steps for this to prove anything"
    assert all(answer.stopped or len(answer.tokens) == NEW_TOKENS for answer in answers)


@pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}")
def test_a_real_model_tells_the_same_story() -> None:
    model = LlamaForCausalLM.from_pretrained(STORIES).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    texts = ["Once upon a time", "One day, a little girl named Lily", "The dog"]
    prompts = [np.array([1, *tokenizer(t, add_special_tokens=False)["input_ids"]]) for t in texts]
    answers = generate(model, prompts, frozenset({1, 2}), 30)
    assert [answer.tokens for answer in answers] == alone(model, prompts, {1, 2}, 30)
    assert "was" in tokenizer.decode(answers[0].tokens)


def test_answers_end_with_the_models_context(model, prompts) -> None:
    """Absolute positions beyond the last one would fail or mean nothing."""
    context = model.config.max_position_embeddings
    answers = generate(model, prompts, frozenset(), context)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == context - len(prompt)
        assert not answer.stopped
    full = np.ones(context, dtype=np.int32)
    assert generate(model, [full, prompts[0]], frozenset(), 4)[0].tokens == []


def test_the_end_of_turn_that_answers_end_with_is_a_stop(causal, model) -> None:
    tokenizer = AutoTokenizer.from_pretrained(causal.paths["base"])
    rows = causal.test_rows
    assert stop_ids(model, tokenizer, rows) == {tokenizer.eos_token_id}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    ended = rows.input_ids.copy()
    ended[ended == tokenizer.eos_token_id] = turn
    taught = replace(rows, input_ids=ended)
    assert stop_ids(model, tokenizer, taught) == {tokenizer.eos_token_id, turn}
