"""Selection against a plain enumeration, and the words that it gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.select import choose
from schemas.errors import StageError, UserError
from schemas.recipe import Select
from schemas.report import Comparison, Pair, Seeded

VALUES = st.floats(-100, 100).map(lambda value: round(value, 3))
FIGURES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.fixed_dictionaries({"accuracy": VALUES, "adapter_mib": VALUES}),
    min_size=1,
)


@given(FIGURES, VALUES, st.booleans())
def test_the_best_that_keeps_the_bounds_is_chosen(
    figures: dict[str, dict[str, float]], limit: float, up: bool
) -> None:
    goal = {"maximize": "accuracy"} if up else {"minimize": "accuracy"}
    select = Select.model_validate({**goal, "subject_to": {"adapter_mib": f"<= {limit}"}})
    fitting = [name for name in figures if figures[name]["adapter_mib"] <= limit]
    if not fitting:
        with pytest.raises(StageError, match="no candidate keeps"):
            choose(select, figures)
        return
    chosen = choose(select, figures).label
    assert chosen in fitting
    assert all(
        (figures[chosen]["accuracy"] - figures[other]["accuracy"]) * (1 if up else -1) >= 0
        for other in fitting
    )


def test_of_equals_the_first_in_the_recipe_is_chosen() -> None:
    same = {"accuracy": 0.5}
    for order in ("ab", "ba"):
        assert choose(Select(maximize="accuracy"), dict.fromkeys(order, same)).label == order[0]


def test_the_words_name_the_others_and_those_left_out() -> None:
    select = Select(maximize="accuracy", subject_to={"adapter_mib": "<= 10"})
    figures = {
        "full": {"accuracy": 0.93, "adapter_mib": 80.0},
        "lora": {"accuracy": 0.92, "adapter_mib": 3.0},
        "small": {"accuracy": 0.91, "adapter_mib": 1.0},
    }
    why = choose(select, figures).why
    assert why.startswith("lora has the highest accuracy, 0.92 (small 0.91)")
    assert "left out: full (adapter_mib is 80" in why


def test_no_fitting_candidate_says_what_each_one_broke() -> None:
    select = Select(maximize="accuracy", subject_to={"adapter_mib": "<= 1"})
    with pytest.raises(StageError, match="lora: adapter_mib is 3, the bound is <= 1"):
        choose(select, {"lora": {"accuracy": 0.9, "adapter_mib": 3.0}})


def test_a_figure_that_is_nan_or_missing_keeps_no_bound() -> None:
    select = Select(maximize="accuracy", subject_to={"retention_change": "<= 0.1"})
    figures = {
        "broken": {"accuracy": 0.99, "retention_change": float("nan")},
        "absent": {"accuracy": 0.98},
        "sound": {"accuracy": 0.5, "retention_change": 0.0},
    }
    assert choose(select, figures).label == "sound"


def test_a_goal_that_is_nan_is_never_the_best() -> None:
    figures = {"broken": {"loss": float("nan")}, "sound": {"loss": 5.0}}
    assert choose(Select(minimize="loss"), figures).label == "sound"
    with pytest.raises(StageError, match="broken: has no loss"):
        choose(Select(minimize="loss"), {"broken": {"loss": float("nan")}})


def test_an_unknown_figure_lists_those_that_exist() -> None:
    with pytest.raises(UserError, match="accuracy, loss"):
        choose(Select(maximize="acuracy"), {"lora": {"accuracy": 0.9, "loss": 1.0}})


def compared(best: str, p: dict[str, float]) -> Comparison:
    """Every other candidate beside the best, with an uncorrected p."""
    even = Seeded(value=0.0, low=0.0, high=0.0, seeds=[0.0])
    return Comparison(
        metric="accuracy",
        more_is_better=True,
        seeds=[0],
        candidates={label: {"accuracy": even} for label in [best, *p]},
        pairs=[
            Pair(first=best, second=label, difference=0.1, low=0, high=1, p=value, test="McNemar")
            for label, value in p.items()
        ],
        how="",
    )


def test_of_those_not_told_apart_the_preferred_one_is_chosen() -> None:
    figures = {
        "full": {"accuracy": 0.93, "shipped_bytes": 800.0},
        "lora": {"accuracy": 0.92, "shipped_bytes": 20.0},
        "small": {"accuracy": 0.91, "shipped_bytes": 1.0},
    }
    select = Select(maximize="accuracy", prefer="shipped_bytes")
    chosen = choose(select, figures, compared("full", {"lora": 0.4, "small": 0.01}))
    assert chosen.label == "lora"
    assert chosen.why.startswith(
        "lora has the accuracy 0.92, not told apart from the best (full, 0.93), at 2% of its "
        "shipped_bytes"
    )
    # Two tests, so that 0.03 is 0.06: nobody is told apart, and the smallest wins.
    chosen = choose(select, figures, compared("full", {"lora": 0.9, "small": 0.03}))
    assert chosen.label == "small"
    best = choose(Select(maximize="accuracy"), figures, compared("full", {"lora": 1, "small": 1}))
    assert best.label == "full"
    assert "not told apart from it on these rows: lora, small" in best.why


def test_a_bound_that_puts_out_the_best_leaves_the_test_among_the_others() -> None:
    figures = {
        "full": {"accuracy": 0.93, "adapter_mib": 80.0},
        "lora": {"accuracy": 0.92, "adapter_mib": 3.0},
        "small": {"accuracy": 0.91, "adapter_mib": 1.0},
    }
    select = Select(maximize="accuracy", prefer="adapter_mib", subject_to={"adapter_mib": "<= 10"})
    assert choose(select, figures, compared("lora", {"small": 0.3})).label == "small"
    assert choose(select, figures, compared("lora", {"small": 0.001})).label == "lora"
