"""Who is timed, in which order, and how the figures come from the times. No time is asserted."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import LlamaForCausalLM

from tasks.evaluate import latency
from tasks.evaluate.latency import DECODE_TOKENS, WARM_UPS, Times, measure, summary
from tasks.evaluate.subject import read_subject


def test_summary_is_quantiles_and_ratios_of_medians() -> None:
    base = Times(prefill=[2.0, 4.0, 100.0], token=[1.0, 2.0, 3.0])
    own = Times(prefill=[6.0, 8.0, 10.0], token=[1.0, 5.0, 5.0])
    row = summary(own, base, batch_size=8, merged=False)
    assert (row.prefill_p50_ms, row.prefill_ratio) == (8.0, 2.0)
    assert row.prefill_p95_ms == pytest.approx(9.8)
    assert (row.token_p50_ms, row.token_ratio) == (5.0, 2.5)


def test_models_take_turns_and_none_is_always_first(causal, monkeypatch) -> None:
    models = {
        name: LlamaForCausalLM.from_pretrained(causal.paths["base"]).eval()
        for name in ("base", "subject", "merged")
    }
    names = {id(model): name for name, model in models.items()}
    order: list[str] = []
    real = latency.time_once

    def recorded(model, batch, task, sink):
        order.append(names[id(model)])
        real(model, batch, task, sink)
        assert len(sink.prefill) * DECODE_TOKENS == len(sink.token)

    monkeypatch.setattr(latency, "time_once", recorded)
    evaluate = causal.spec.evaluate
    rows = measure(models, causal.test_rows, "causal-lm", evaluate, frozenset({"merged"}))

    turns = WARM_UPS + evaluate.repeats
    rounds = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(rounds) == turns * len(evaluate.batch_sizes)
    assert all(sorted(turn) == ["base", "merged", "subject"] for turn in rounds)
    assert set(Counter(turn[0] for turn in rounds)) == set(models)
    assert [(row.batch_size, row.merged) for row in rows] == [
        (size, merged) for size in evaluate.batch_sizes for merged in (False, True)
    ]


def test_whoever_is_timed_is_loaded_alike(causal_lora) -> None:
    """A weight that asks for a gradient makes another, slower or faster, path through torch."""
    subject = read_subject(causal_lora.spec, causal_lora.paths)
    for model in (subject.load_base(), subject.load(), subject.load_merged()):
        assert not model.training
        assert not any(weight.requires_grad for weight in model.parameters())


def test_the_base_alone_is_its_own_measure(classes) -> None:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(classes.paths["base"]).eval()
    rows = measure(
        {"base": model}, classes.test_rows, classes.spec.task, classes.spec.evaluate, frozenset()
    )
    assert [row.prefill_ratio for row in rows] == [1.0, 1.0]
    assert [row.token_ratio for row in rows] == [None, None]
