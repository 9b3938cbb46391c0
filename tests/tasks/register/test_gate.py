"""The gate's verdict follows from bounds and figures alone."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tasks.register.gate import in_words, judge

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))
SIGNS = {
    ">=": lambda value, limit: value >= limit,
    "<=": lambda value, limit: value <= limit,
    ">": lambda value, limit: value > limit,
    "<": lambda value, limit: value < limit,
}


@given(value=NUMBERS, limit=NUMBERS, sign=st.sampled_from(sorted(SIGNS)))
def test_a_bound_means_what_it_says(value: float, limit: float, sign: str) -> None:
    verdict = judge({"accuracy": f"{sign} {limit!r}"}, {"accuracy": value})
    assert verdict.passed == SIGNS[sign](value, limit)
    assert (in_words(verdict) == "") == verdict.passed


@given(values=st.lists(NUMBERS, min_size=1, max_size=4))
def test_every_bound_must_hold(values: list[float]) -> None:
    figures = {f"figure_{index}": value for index, value in enumerate(values)}
    verdict = judge(dict.fromkeys(figures, ">= 0"), figures)
    assert verdict.passed == all(value >= 0 for value in values)
    assert len(verdict.checks) == len(values)


def test_an_empty_gate_is_open() -> None:
    assert judge({}, {}).passed


def test_what_was_not_measured_does_not_pass() -> None:
    verdict = judge({"acuracy": ">= 0"}, {"accuracy": 1.0, "loss": 0.1})
    assert not verdict.passed
    assert in_words(verdict) == "the report has no figure 'acuracy'; did you mean accuracy?"
    assert not judge({"accuracy": ">= 0"}, {"accuracy": math.nan}).passed
