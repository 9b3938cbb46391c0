"""Every measurement stands behind a soft prompt as PEFT's own forward does, one row at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from schemas.candidates import PrefixTuning, PromptTuning, PTuning
from tasks.evaluate.batches import context_limit
from tasks.evaluate.computation import backward_flops, forward_flops, micro_batch
from tasks.evaluate.generate import generate
from tasks.evaluate.scoring import answer_losses
from tasks.evaluate.stage import run
from tasks.methods.table import METHODS

V = 5
SOFT = [
    PromptTuning(method="prompt_tuning", virtual_tokens=V),
    PTuning(method="p_tuning", virtual_tokens=V),
    PrefixTuning(method="prefix_tuning", virtual_tokens=V),
]
soft_prompts = pytest.mark.parametrize("candidate", SOFT, ids=lambda c: c.method)


def built(causal: Any, candidate: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(causal.paths["base"])
    return METHODS[candidate.method].build(base, candidate, "causal-lm").eval()


@soft_prompts
def test_answers_of_padded_prompts_are_pefts_own(causal, candidate) -> None:
    """Batches of 14 prompts from which rows leave early, against PEFT's generate of each."""
    model, rows = built(causal, candidate), causal.test_rows
    prompts = [rows.row(index)[: rows.answer_start[index]] for index in range(len(rows))]
    expected = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt[None].astype(np.int64))
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(written[0, -10:].tolist())
    answers = generate(model, prompts, frozenset(), 10)
    assert [answer.tokens for answer in answers] == expected
    stops = frozenset({expected[0][3], expected[5][6]})
    cut = [next((at for at, t in enumerate(row) if t in stops), 10) for row in expected]
    answers = generate(model, prompts, stops, 10)
    assert [a.tokens for a in answers] == [r[:n] for r, n in zip(expected, cut, strict=True)]
    assert len(set(cut)) > 1, "rows must end at different steps for this to prove anything"


@soft_prompts
def test_losses_of_padded_rows_are_pefts_own(causal, candidate) -> None:
    model, rows = built(causal, candidate), causal.test_rows
    loss_N, _ = answer_losses(model, rows, "loss")
    with torch.no_grad():
        for index, loss in enumerate(loss_N):
            ids = torch.from_numpy(rows.row(index)[None].astype(np.int64))
            logits = model(input_ids=ids).logits[0, -ids.shape[1] : -1]
            learned = torch.from_numpy(rows.mask(index).astype(bool))[1:]
            own = torch.nn.functional.cross_entropy(
                logits[learned], ids[0, 1:][learned], reduction="sum"
            )
            # float32: sums of some ten terms over other shapes.
            assert loss == pytest.approx(own.item(), rel=1e-5)


@soft_prompts
def test_the_context_is_shorter_by_the_virtual_tokens(causal, candidate) -> None:
    model = built(causal, candidate)
    context = model.config.max_position_embeddings - V
    assert context_limit(model) == context
    prompt = causal.test_rows.row(0)[:3]
    [answer] = generate(model, [prompt], frozenset(), context)
    assert len(answer.tokens) == context - 3


@soft_prompts
def test_what_a_prefix_costs_is_the_longer_attention_and_a_prompt_its_pass_too(
    causal, candidate
) -> None:
    model = built(causal, candidate)
    batch = micro_batch(causal.test_rows, "causal-lm", 64)
    plain = forward_flops(model.get_base_model(), batch)
    config = model.config
    rows, length = batch.inputs["input_ids"].shape
    # Scores and their product with values, 2 FLOPs a multiply-add, over V keys more a token.
    attention = 2 * 2 * config.num_hidden_layers * config.hidden_size * V
    extra = (forward_flops(model, batch) - plain) - attention
    if candidate.method == "prefix_tuning":
        assert extra == pytest.approx(0, abs=1e-6)
    else:
        # One pass over V tokens for all rows, without the head, which has logits to keep.
        assert 0 < extra < plain * V / (rows * length) * 1.5
    assert backward_flops(model, batch) > 0


@soft_prompts
def test_the_whole_stage_measures_a_soft_prompt(causal, trained, tmp_path, candidate) -> None:
    world = causal.of("candidate", trained(causal, tmp_path / "store", candidate))
    out = tmp_path / "out"
    out.mkdir()
    facts = run(world.spec, world.paths, out)
    assert facts is not None
    assert (out / "criteria.json").exists()
