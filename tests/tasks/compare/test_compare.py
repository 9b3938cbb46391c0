"""The paired tests against slow references, and against what they promise."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import StageError
from schemas.report import RETENTION, Comparison, CriteriaReport, Interval
from schemas.stages import CompareSpec
from tasks.compare.paired import Resamples, difference, mcnemar, over_seeds
from tasks.compare.stage import compare, run
from tasks.core import bootstrap
from tasks.core.apart import best_of, holm, told_apart

RIGHT = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12)


@given(RIGHT)
def test_mcnemar_is_the_share_of_coin_throws_as_lopsided(rows: list[tuple[bool, bool]]) -> None:
    """By enumeration: each row that one alone has right falls to either side alike."""
    one, other = (np.array(column) for column in zip(*rows, strict=True))
    p = mcnemar(bootstrap.mean(one), bootstrap.mean(other))
    apart = [a for a, b in rows if a != b]
    gap = abs(2 * sum(apart) - len(apart))
    throws = itertools.product((False, True), repeat=len(apart))
    as_far = [abs(2 * sum(throw) - len(apart)) >= gap for throw in throws]
    assert p == pytest.approx(sum(as_far) / len(as_far))


def test_mcnemar_holds_for_more_rows_than_floats_can_count() -> None:
    right = np.arange(6000) < 3000
    p = mcnemar(bootstrap.mean(right), bootstrap.mean(~right))
    assert p == 1.0
    almost = mcnemar(
        bootstrap.mean(np.arange(6000) < 3200), bootstrap.mean(np.arange(6000) >= 3200)
    )
    # Normal approximation of the binomial: z = (400 - 1) / sqrt(6000), which is good to 1 % here.
    assert almost == pytest.approx(math.erfc(399 / math.sqrt(6000) / math.sqrt(2)), rel=0.02)


def test_mcnemar_is_for_right_and_wrong_alone() -> None:
    right = bootstrap.mean(np.array([1, 0, 1]))
    assert mcnemar(right, bootstrap.mean(np.array([0.5, 0, 1]))) is None
    assert mcnemar(right, bootstrap.ratio(np.array([1, 0, 1]), np.array([2, 1, 1]))) is None


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=3), st.floats(1e-6, 1), min_size=1))
def test_holm_keeps_the_order_and_corrects_the_smallest_most(p: dict[str, float]) -> None:
    corrected = holm(p)
    first = min(p, key=lambda name: p[name])
    assert corrected[first] == min(1.0, len(p) * p[first])
    ordered = sorted(p, key=lambda name: p[name])
    assert [corrected[name] for name in ordered] == sorted(corrected.values())
    assert all(p[name] <= corrected[name] <= 1 for name in p)


def test_one_seed_gives_the_interval_of_the_evaluation() -> None:
    loss = bootstrap.mean(np.random.default_rng(0).random(60))
    found = over_seeds([loss], Resamples(300, 1))
    plain = bootstrap.interval(loss, 300)
    assert (found.value, found.low, found.high) == (plain.value, plain.low, plain.high)
    assert found.seeds == [plain.value]


def test_seeds_that_differ_widen_the_interval() -> None:
    """Two seeds whose every row differs by 1: seeds drawn anew alone give 0, 0.5 and 1."""
    low, high = (bootstrap.mean(np.full(50, value)) for value in (0.0, 1.0))
    found = over_seeds([low, high], Resamples(400, 2))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)
    same = over_seeds([low, low], Resamples(400, 2))
    assert (same.low, same.high) == (0.0, 0.0)


def spec(labels: list[str], seeds: list[int], metric: str = "accuracy") -> CompareSpec:
    return CompareSpec(
        labels=labels, seeds=seeds, metric=metric, more_is_better=metric != "loss", resamples=500
    )


def subject(*rows: np.ndarray) -> list[dict[str, bootstrap.Statistic]]:
    return [{"accuracy": bootstrap.mean(row)} for row in rows]


def test_pairing_finds_what_overlapping_intervals_hide() -> None:
    """Of 400 rows one candidate has 12 more right and none less. Each interval is 8 points wide,
    and rows drawn apart would be too; on the same rows it is one in 2,048 throws."""
    rng = np.random.default_rng(5)
    own = rng.random(400) < 0.8
    better = own.copy()
    better[np.flatnonzero(~own)[:12]] = True
    for seeds in ([0], [0, 1]):
        found = compare(
            spec(["a", "b"], seeds),
            {"a": subject(*[own] * len(seeds)), "b": subject(*[better] * len(seeds))},
        )
        a, b = (found.candidates[label]["accuracy"] for label in "ab")
        assert a.high > b.low
        assert best_of(found) == "b"
        [test] = told_apart(found, "b", ["a"])
        assert test.apart
        assert test.difference == pytest.approx(-0.03)
        assert test.low <= -0.03 <= test.high < 0
        assert found.pairs[0].test == ("McNemar" if len(seeds) == 1 else "paired bootstrap")
    exact = compare(spec(["a", "b"], [0]), {"a": subject(own), "b": subject(better)})
    assert exact.pairs[0].p == 2 / 2**12


def test_equal_candidates_are_seldom_told_apart() -> None:
    """Of 100 pairs that differ by chance alone about 5 are called different; with 10 at most the
    chance of a false alarm of this test is 1 % (binomial)."""
    rng = np.random.default_rng(8)
    called = 0
    for _ in range(100):
        loss = rng.random((2, 80))
        found = compare(
            spec(["a", "b"], [0], "loss"),
            {label: [{"loss": bootstrap.mean(row)}] for label, row in zip("ab", loss, strict=True)},
        )
        [test] = told_apart(found, best_of(found), [{"a": "b", "b": "a"}[best_of(found)]])
        called += test.apart
    assert called <= 10


def test_too_few_resamples_to_tell_anybody_apart_are_said_aloud(tmp_path, capsys) -> None:
    """Losses of 0 and 1 on every row: as far apart as can be."""
    labels = list("abcde")

    def ran(resamples: int) -> str:
        paths = {}
        for label in labels:
            path = tmp_path / label
            path.mkdir(exist_ok=True)
            losses = bootstrap.mean(np.full(50, float(label != "a")))
            bootstrap.save_statistics({"loss": losses}, path / "statistics.safetensors")
            paths[f"{label}/0"] = paths[f"{label}/1"] = path
        asked = spec(labels, [0, 1], "loss").model_copy(update={"resamples": resamples})
        run(asked, paths, tmp_path)
        return capsys.readouterr().err

    def apart() -> bool:
        found = Comparison.model_validate_json((tmp_path / "comparison.json").read_text())
        return told_apart(found, "a", labels[1:])[0].apart

    assert "tell none of 5 candidates apart, however far they are; write 160 or more" in ran(100)
    assert not apart()
    assert ran(159)
    assert not apart()
    assert not ran(160)
    assert apart()


def test_the_difference_is_the_first_ones_minus_the_second_ones() -> None:
    first, second = bootstrap.mean(np.full(9, 0.75)), bootstrap.mean(np.full(9, 0.5))
    resamples = Resamples(100, 1)
    gap = difference([first], [second], resamples.means([first]) - resamples.means([second]))
    assert (gap.value, gap.low, gap.high) == (0.25, 0.25, 0.25)
    assert gap.p == 2 / 101


def test_seeds_on_other_rows_are_refused() -> None:
    with pytest.raises(StageError, match=r"\[3, 4\] rows"):
        over_seeds([bootstrap.mean(np.ones(3)), bootstrap.mean(np.ones(4))], Resamples(100, 2))


def test_the_stage_reads_what_evaluations_leave(tmp_path: Path) -> None:
    paths = {}
    for label, share in (("a", 0.5), ("b", 0.9)):
        for seed in (0, 1):
            path = tmp_path / label / str(seed)
            path.mkdir(parents=True)
            right = np.random.default_rng(seed).random(200) < share
            classes = right.astype(np.int64)
            statistics = {
                "accuracy": bootstrap.mean(right),
                "macro_f1": bootstrap.macro_f1(np.ones(200, np.int64), classes),
                "perplexity": bootstrap.exponential(bootstrap.mean(right)),
            }
            bootstrap.save_statistics(statistics, path / "statistics.safetensors")
            again = bootstrap.load_statistics(path / "statistics.safetensors")
            assert {name: one.value for name, one in again.items()} == {
                name: one.value for name, one in statistics.items()
            }
            paths[f"{label}/{seed}"] = path
    run(spec(["a", "b"], [0, 1]), paths, tmp_path)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert set(found["candidates"]["a"]) == {"accuracy", "macro_f1", "perplexity"}
    assert found["pairs"][0]["p"] < 0.05


def test_what_is_forgotten_is_of_all_seeds_too() -> None:
    """Texts are other rows than the test rows, and as many as they are."""
    first = Path(__file__).parents[2] / "flows" / "criteria.json"
    report = CriteriaReport.model_validate_json(first.read_text())
    learned = report.accuracy.model_copy(
        update={
            "retention_loss": 3.1,
            "retention_loss_base": 3.0,
            "retention_change": Interval(value=0.1, low=0.1, high=0.1),
        }
    )
    report = report.model_copy(update={"accuracy": learned})
    forgot = [bootstrap.ratio(np.full(30, 40 * nats), np.full(30, 40)) for nats in (0.1, 0.5, 0.9)]
    asked = spec(["a"], [0, 1, 2], "loss")
    loss = bootstrap.mean(np.random.default_rng(0).random(50))
    found = compare(asked, {"a": [{"loss": loss, RETENTION: one} for one in forgot]})
    told = found.over_seeds("a", report)
    assert found.candidates["a"][RETENTION].seeds == pytest.approx([0.1, 0.5, 0.9])
    change = told.accuracy.retention_change
    assert change is not None
    # Every text forgets alike, so that seeds alone, drawn anew, make the interval.
    assert (change.value, change.low, change.high) == pytest.approx((0.5, 0.1, 0.9))
    assert told.figures()[RETENTION] == pytest.approx(0.5)
    assert told.accuracy.retention_loss == pytest.approx(3.5)
    assert told.accuracy.retention_loss_base == 3.0
    assert set(told.accuracy.metrics) == {"loss"}
