"""The learning rate's shape, and what stops a run that goes wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import StageError, UserError
from schemas.recipe import Train
from schemas.report import CurvePoint
from tasks.core.schedule import learning_rate, total_steps, warmup_steps
from tasks.train.memory import check_fits
from tasks.train.watch import check_diverged, check_finite, digests, unmoved


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(1, 200),
    st.floats(0, 0.9),
)
def test_rates_rise_then_never_rise_again_and_no_step_is_wasted(schedule, steps, ratio):
    train = Train(schedule=schedule, warmup_ratio=ratio, learning_rate=1.0)
    rates = [learning_rate(train, step, steps) for step in range(steps)]
    warmup = warmup_steps(train, steps)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < steps:
        assert max(rates) == rates[warmup] == 1


def test_steps_by_epochs_or_as_told():
    assert total_steps(Train(epochs=2.5), 10) == 25
    assert total_steps(Train(epochs=0.01), 10) == 1
    assert total_steps(Train(max_steps=7), 10) == 7


def curve(losses: list[float]) -> list[CurvePoint]:
    return [
        CurvePoint(
            step=i + 1, epoch=0, loss=x, learning_rate=6e-3, grad_norm=1, tokens=1, step_time_s=1
        )
        for i, x in enumerate(losses)
    ]


def test_a_collapsed_classifier_is_stopped_with_the_cure():
    """As a LoRA on banking77 at 6e-3, whose loss stays 1 % above that of guessing."""
    guessing = math.log(77)
    losses = [4.35] * 10 + [3.0] * 20 + [1.01 * guessing] * 50
    with pytest.raises(StageError, match=r"diverged.*lower train\.learning_rate \(try 1\.5e-03\)"):
        check_diverged(curve(losses), warmup=5, chance=guessing)


@pytest.mark.parametrize(
    ("losses", "chance"),
    [
        ([4.3 - 0.01 * step for step in range(100)], math.log(77)),
        ([2.0] * 10 + [9.0] * 9, None),  # too early to say
        ([2.0] * 40 + [9.0] + [1.0] * 9, None),  # one hard batch
        ([2.0] + [2.5, 2.3] * 50, None),  # an easy first batch, and learning that is slow
        ([4.36, 4.34] * 50, math.log(77)),  # a classifier that has not begun to learn
        (
            [7.0 * 0.998**step for step in range(230)],
            math.log(77),
        ),  # above guessing, but on its way down
    ],
)
def test_runs_that_learn_however_slowly_go_on(losses, chance):
    for steps in range(1, len(losses) + 1):
        check_diverged(curve(losses[:steps]), warmup=0, chance=chance)


def test_a_loss_that_blows_up_is_stopped():
    with pytest.raises(StageError, match="of the first steps"):
        check_diverged(curve([2.0] * 10 + [9.0] * 10), warmup=0, chance=None)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_no_number_any_more_is_an_error_with_the_step(loss, norm):
    point = curve([1.0])[0].model_copy(update={"loss": loss, "grad_norm": norm, "step": 12})
    with pytest.raises(StageError, match=r"at step 12.*lower train\.learning_rate"):
        check_finite(point)


def test_a_gradient_that_went_dead_is_an_error_unless_all_is_learned():
    points = curve([9.0, 9.8])
    dead = [points[0], points[1].model_copy(update={"grad_norm": 0.0})]
    with pytest.raises(StageError, match=r"exactly 0 from step 2.*lower train\.learning_rate"):
        check_diverged(dead, 0, None)
    check_diverged(points, 0, None)
    check_diverged([dead[0], dead[1].model_copy(update={"loss": 0.001})], 0, None)
    # From the first step on it is a method that does not reach the loss, which is told elsewhere.
    check_diverged([point.model_copy(update={"grad_norm": 0.0}) for point in points], 0, None)


def test_weights_that_stood_still_are_named():
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in "ab"}
    before = digests(weights)
    assert unmoved(before, weights) == ["a", "b"]
    weights["b"].data[1] += 1e-6
    assert unmoved(before, weights) == ["a"]


def test_a_run_that_does_not_fit_says_so_with_the_cure():
    check_fits(10, 11, False)
    with pytest.raises(UserError, match=r"micro_batch_tokens.*gradient_checkpointing"):
        check_fits(2000, 1000, False)
