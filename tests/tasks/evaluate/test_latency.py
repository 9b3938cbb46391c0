"""Who is timed, in which order, and how the figures come from the times. No time is asserted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from transformers import LlamaForCausalLM

from schemas.recipe import Evaluate
from schemas.report import CriteriaReport, Interval, Latency
from tasks.evaluate import latency
from tasks.evaluate.latency import (
    DECODE_TOKENS,
    WARM_UPS,
    Times,
    measure,
    median_ratio,
    quantile,
    summary,
)
from tasks.evaluate.subject import read_subject


def test_summary_is_quantiles_and_ratios_of_turns() -> None:
    base = Times(prefill=[2.0, 4.0, 100.0], token=[1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    own = Times(prefill=[6.0, 8.0, 10.0], token=[1.0, 1.0, 4.0, 6.0, 6.0, 9.0])
    row = summary(own, base, batch_size=8, prompt_tokens=64, merged=False)
    assert row.prefill_p50_ms == 8.0
    assert row.prefill_p95_ms == pytest.approx(9.8)
    assert row.prefill_ratio == Interval(value=2.0, low=0.1, high=3.0)
    assert row.token_p50_ms == 5.0
    assert row.token_ratio == Interval(value=2.5, low=1.0, high=2.5)


def test_what_slows_a_turn_down_moves_no_ratio() -> None:
    """A machine that becomes four times slower half-way, which moves a ratio of medians."""
    slow = [1.0] * 9 + [4.0] * 11
    base = [2.0 * factor for factor in slow]
    own = [3.0 * factor for factor in slow]
    assert median_ratio(own, base) == Interval(value=1.5, low=1.5, high=1.5)
    assert quantile(own[:10], 0.5) / quantile(base[10:], 0.5) < 0.5


def test_the_interval_of_a_median_covers_as_often_as_it_says() -> None:
    """2,000 samples of 20 lognormal ratios, whose median is 1: exactly 95.9 % cover by the
    binomial, so the count has a standard deviation of 9 around 1,917; five of these are allowed.
    """
    draw = np.random.default_rng(0)
    found = [median_ratio(list(draw.lognormal(0, 0.3, 20)), [1.0] * 20) for _ in range(2000)]
    covered = sum(interval.low <= 1 <= interval.high for interval in found)
    assert abs(covered - 1917) <= 45
    assert all(one.low < one.value < one.high for one in found)


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
    assert len(rounds) == turns * len(evaluate.batch_sizes) * len(evaluate.prompt_lengths)
    assert all(sorted(turn) == ["base", "merged", "subject"] for turn in rounds)
    assert set(Counter(turn[0] for turn in rounds)) == set(models)
    assert [(row.prompt_tokens, row.batch_size, row.merged) for row in rows] == [
        (length, size, merged) for length in (16, 8) for size in (1, 3) for merged in (False, True)
    ]


def test_a_prompt_length_is_what_is_timed(causal, monkeypatch, capsys) -> None:
    """The first is cut to the context, as answers are; a further one that does not fit is left
    out, or two names would be of one length."""
    model = LlamaForCausalLM.from_pretrained(causal.paths["base"]).eval()
    widths: list[int] = []
    real = latency.time_once

    def recorded(model, batch, task, sink):
        widths.append(batch["input_ids"].shape[1])
        real(model, batch, task, sink)

    monkeypatch.setattr(latency, "time_once", recorded)
    for asked, timed, told in (([8, 32, 8], [8, 32], False), ([400, 16, 300], [92, 16], True)):
        evaluate = Evaluate(prompt_tokens=asked, batch_sizes=[1], repeats=3)
        rows = measure({"base": model}, causal.test_rows, "causal-lm", evaluate, frozenset())
        assert [row.prompt_tokens for row in rows] == asked[:2]
        assert list(dict.fromkeys(widths)) == timed
        assert ("300 prompt tokens do not fit" in capsys.readouterr().err) == told
        widths.clear()


def test_the_first_length_has_the_plain_names() -> None:
    rows = [
        Latency(
            batch_size=1,
            prompt_tokens=length,
            merged=merged,
            prefill_p50_ms=1,
            prefill_p95_ms=1,
            token_p50_ms=None,
            token_p95_ms=None,
            prefill_ratio=Interval(value=1, low=1, high=1),
            token_ratio=None,
        )
        for length in (64, 16)
        for merged in (False, True)
    ]
    report = CriteriaReport.model_construct(inference_overhead=rows)
    assert [report.tag(row) for row in rows] == ["b1", "b1_merged", "b1_p16", "b1_p16_merged"]


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
    assert [row.prefill_ratio for row in rows] == [Interval(value=1, low=1, high=1)] * 4
    assert [row.token_ratio for row in rows] == [None] * 4
