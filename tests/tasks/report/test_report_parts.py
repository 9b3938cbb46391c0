"""The parts of the page that compute: fronts, labels, scales, differences, curves, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.report import Interval
from schemas.stages import PageSpec
from schemas.tasks import TASKS
from tasks.report.apart import apart, rates, recommendation
from tasks.report.criteria import criteria_table, marked
from tasks.report.curves import CURVE_POINTS, loss_plot, running_mean, thinned
from tasks.report.data_view import refused_rows
from tasks.report.examples import LONGEST, clipped, differences
from tasks.report.figures import KNOWN, figure, in_words, scale
from tasks.report.inputs import Inputs
from tasks.report.overhead import as_served, overhead_figure
from tasks.report.pareto import joined_labels, label_positions, pareto_front
from tasks.report.predicted import SIZES, on_larger, predicted
from tasks.report.provenance import without_directories
from tasks.report.run import render
from tasks.report.summary import quality_figure, tiles, verdict

# Few distinct values, so that ties in one figure and in both are common.
POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(POINTS, st.booleans())
def test_pareto_front_is_that_of_the_definition(points: list[tuple[int, int]], high: bool) -> None:
    sign = -1 if high else 1

    def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
        left, right = (one[0], sign * one[1]), (other[0], sign * other[1])
        return left != right and left[0] <= right[0] and left[1] <= right[1]

    slow = {point for point in points if not any(dominates(one, point) for one in points)}
    front = pareto_front(points, higher_is_better=high)
    assert {points[i] for i in front} == slow
    assert len(front) == len(slow)
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_labels_of_one_place_are_joined_and_neighbours_keep_apart() -> None:
    points = [(0.2, 0.5), (0.2, 0.5), (0.21, 0.47)]
    labels = joined_labels(points, ["lora", "finished", "full"])
    assert labels == ["lora, finished", "", "full"]
    positions = label_positions(points, labels)
    assert positions[0] != positions[2]


@pytest.mark.parametrize(
    ("name", "values", "texts", "unit"),
    [
        ("accuracy", [0.9264, 0.0131], ["92.6", "1.3"], "%"),
        ("shipped_bytes", [7_461_088, 226_400, 0], ["7.12", "0.22", "0"], "MiB"),
        ("trainable_parameters", [22_713_216, 1_327_104], ["22.7", "1.3"], "M"),
        ("step_time_s", [0.212, 0.0087], ["212.0", "8.7"], "ms"),
        ("step_time_s", [3.21, 0.9], ["3.21", "0.90"], "s"),
        ("forward_flops_per_token", [7.4e9, 8.05e9], ["7.40", "8.05"], "GFLOP"),
        ("retention_change", [-0.0123, 0.41], ["−0.012", "0.410"], "nats"),
        ("retention_change", [-0.0001, 0.41], ["0.000", "0.410"], "nats"),
        ("token_ratio_b8_merged", [1.0], ["1.00"], "× base"),
        ("train_tokens_per_s", [27489.9, 19320.7], ["27,490", "19,321"], "tokens/s"),
        ("loss", [float("nan"), 0.5], ["not finite", "0.500"], "nats"),
    ],
)
def test_a_row_has_one_unit_and_one_precision(
    name: str, values: list[float], texts: list[str], unit: str
) -> None:
    written = scale(figure(name), values)
    assert written.unit == unit
    assert [written.text(value) for value in values] == texts


def test_best_and_worst_are_of_the_candidates_alone(spec: PageSpec, inputs: Inputs) -> None:
    rows = {row.names: row for group in criteria_table(inputs, spec.labels) for row in group.rows}
    marks = [cell.mark if cell else None for cell in rows["exact_match"].cells]
    assert marks == [None, "best", None, "worst", None]
    marks = [cell.mark if cell else None for cell in rows["shipped_bytes adapter_mib"].cells]
    assert marks == [None, "worst", None, "best", None]
    # No direction, no mark; nor where all candidates read the same.
    assert not any(cell and cell.mark for cell in rows["base_generate_peak_mib"].cells)
    assert not any(cell and cell.mark for cell in rows["generate_peak_mib"].cells)


def test_what_reads_the_same_is_marked_the_same() -> None:
    values = {"a": 0.9001, "b": 0.9002, "c": 0.8, "d": 0.85}
    texts = {"a": "90.0", "b": "90.0", "c": "80.0", "d": "85.0"}
    marks = {"a": "best", "b": "best", "c": "worst"}
    assert marked(figure("accuracy"), values, texts) == marks
    del values["d"]
    # Two of three are best: only the one that is not stands out.
    assert marked(figure("accuracy"), values, texts) == {"c": "worst"}


def test_the_verdict_names_goal_interval_rows_and_base(spec: PageSpec, inputs: Inputs) -> None:
    assert verdict(spec, inputs).replace("\u00a0", " ") == (
        "is selected: exact match 94.8 % (95 % interval 92.6 to 97.0) on 400 held-out rows, "
        "against 0 % for the untouched base."
    )
    manifest = inputs.manifests["evaluate:lora-r16"]
    some = manifest.model_copy(update={"spec": {"evaluate": {"generate_rows": 60}}})
    fewer = Inputs(**(vars(inputs) | {"manifests": {"evaluate:lora-r16": some}}))
    assert "on 60 held-out rows" in verdict(spec, fewer)
    assert "on 400 held-out rows" in verdict(spec.model_copy(update={"goal": "loss"}), fewer)
    small = spec.model_copy(update={"goal": "adapter_mib"})
    assert quality_figure(small, inputs) == "exact_match"
    assert "shipped for this task 0.861 MiB, and exact match" in verdict(small, inputs).replace(
        "\u00a0", " "
    )
    assert in_words("perplexity", 5.125) == "5.12"


@given(st.text(max_size=60), st.text(max_size=60))
def test_differences_lose_no_letter(expected: str, got: str) -> None:
    left, right = differences(expected, got)
    assert "".join(span.text for span in left) == expected
    assert "".join(span.text for span in right) == got
    common = ["".join(span.text for span in side if not span.differs) for side in (left, right)]
    assert common[0] == common[1]
    assert (expected == got) == (not any(span.differs for span in [*left, *right]))


def test_differences_mark_the_value_that_is_wrong() -> None:
    left, right = differences('{"id": "4411"}', '{"id": "4111"}')
    assert [span.text for span in left if span.differs] == ["4411"]
    assert [span.text for span in right if span.differs] == ["4111"]


def test_long_texts_say_how_much_is_left_out() -> None:
    assert clipped("x" * LONGEST) == "x" * LONGEST
    assert clipped("x" * (LONGEST + 1500)).endswith("x … (1,500 more characters)")


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40), st.integers(0, 9))
def test_running_mean_is_the_mean_of_each_window(values: list[float], radius: int) -> None:
    mean = running_mean(np.array(values), radius)
    for i, value in enumerate(mean):
        reach = min(radius, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        # Sums of up to 40 values of up to 1e3, taken as differences of running totals.
        assert value == pytest.approx(sum(window) / len(window), abs=1e-9)


@pytest.mark.parametrize("count", [1, CURVE_POINTS, CURVE_POINTS + 1, 123_456])
def test_thinned_curves_keep_both_ends(count: int) -> None:
    kept = thinned(count)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) == min(count, CURVE_POINTS)
    assert max(np.diff(kept), default=1) <= np.ceil(count / CURVE_POINTS) + 1


def test_one_refused_row_is_shown_for_each_reason(entries: dict[str, Path]) -> None:
    rows = refused_rows(entries["prepared"] / "quarantine.parquet")
    assert [(row.split, row.line, row.reasons) for row in rows] == [
        ("train", 7, "empty_answer"),
        ("train", 31, "wrong_type:prompt"),
        ("test", 1204, "duplicate_of:88, too_long:912"),
    ]


@pytest.mark.parametrize(
    ("line", "cut"),
    [
        ("model: /home/who/models/tiny", "model: …/tiny"),
        ("model: ~/models/tiny/", "model: …/tiny"),
        ('path: "/data/a b.csv"', 'path: "…/a b.csv"'),
        (r"path: C:\data\rows.csv", "path: …/rows.csv"),
        ("model: quickstart/base", "model: quickstart/base"),
        ("path: ../shared/data/x.csv", "path: ../shared/data/x.csv"),
        ("path: hub:org/name", "path: hub:org/name"),
        ("# see https://example.org/a/b", "# see https://example.org/a/b"),
        ("# train/test by hash, 1/2 each", "# train/test by hash, 1/2 each"),
    ],
)
def test_absolute_paths_are_cut_to_their_names(line: str, cut: str) -> None:
    assert without_directories(line) == cut


def test_who_is_told_apart_and_who_is_not(spec: PageSpec, inputs: Inputs) -> None:
    """Two tests against the best, so that p is doubled where it is smallest (Holm)."""
    found = apart(inputs)
    assert found is not None
    assert [row.label for row in found.rows] == ["full", "lora-r16", "lora-r4"]
    assert [row.verdict for row in found.rows] == ["the best", "not distinguishable", "told apart"]
    assert [row.p for row in found.rows] == ["", "0.400", "0.004"]
    # 94.8 % and 95.5 %, seen from the best one.
    assert found.rows[1].difference == "−0.7"
    assert found.rows[1].interval == "−9.0 to +1.0"
    assert found.rows[1].seeds == "94.8, 94.8"


def test_the_recommendation_speaks_of_distance_storage_and_speed(
    spec: PageSpec, inputs: Inputs
) -> None:
    words = " ".join(recommendation(spec, inputs)).replace("\u00a0", " ")
    assert "lora-r16 is within 0.7 points of the best, full." in words
    assert "It ships 1/8 of what full does." in words
    assert "Not distinguishable from full (p ≥ 0.05): lora-r16." in words


def test_slower_is_who_is_told_apart_and_noticed(spec: PageSpec, inputs: Inputs) -> None:
    """lora-r16 as it is served, merged, has 0.99 ± 0.03 of the base's time for a token."""

    def said(low: float, value: float, high: float) -> bool:
        ratio = Interval(value=value, low=low, high=high)
        report = inputs.reports["full"]
        changed = {"token_ratio": ratio}
        rows = [row.model_copy(update=changed) for row in report.inference_overhead]
        slower = report.model_copy(update={"inference_overhead": rows})
        words = recommendation(spec, replace(inputs, reports=inputs.reports | {"full": slower}))
        found = any("Slower at batch 1 than lora-r16: full" in sentence for sentence in words)
        assert not found or f"full {value / 0.99 - 1:.0%} (per token)" in " ".join(words)
        return found

    assert said(1.2, 1.3, 1.4)
    assert not said(1.0, 1.3, 1.6), "the intervals meet"
    assert not said(1.025, 1.03, 1.035), "nobody would notice"


def test_slower_goes_by_the_form_that_is_served_and_by_the_worse_phase(
    spec: PageSpec, inputs: Inputs
) -> None:
    """lora-r16 was measured in both forms, full as it is."""
    slow = Interval(value=1.6, low=1.5, high=1.7)

    def said(merges: bool, **changed: Interval) -> str:
        report = inputs.reports["full"]
        rows = [row.model_copy(update=changed) for row in report.inference_overhead]
        slower = report.model_copy(update={"inference_overhead": rows})
        reports = inputs.reports | {"full": slower}
        served = spec.model_copy(update={"merges": merges})
        return " ".join(recommendation(served, replace(inputs, reports=reports)))

    own = inputs.reports["lora-r16"].intervals()
    unmerged, merged = own["token_ratio_b1"], own["token_ratio_b1_merged"]
    assert unmerged.low > merged.high, "the two forms differ, or nothing is shown"
    assert f"full {1.6 / merged.value - 1:.0%} (per token)" in said(True, token_ratio=slow)
    assert f"full {1.6 / unmerged.value - 1:.0%}" in said(False, token_ratio=slow)
    prefill = own["prefill_ratio_b1_merged"].value
    twice = Interval(value=2 * prefill, low=1.9 * prefill, high=2.1 * prefill)
    assert "full 100% (prefill)" in said(True, prefill_ratio=twice)


def test_the_budget_of_each_is_told_and_that_they_differ(spec: PageSpec, inputs: Inputs) -> None:
    def said(**lengths: int) -> str:
        curves = {label: inputs.curves[label][:length] for label, length in lengths.items()}
        return recommendation(spec, replace(inputs, curves=inputs.curves | curves))[-1]

    point = inputs.curves["full"][9]
    alike = dict.fromkeys(spec.labels, inputs.curves["full"])
    words = recommendation(spec, replace(inputs, curves=inputs.curves | alike))[-1]
    last = inputs.curves["full"][-1]
    assert (
        words == f"What is trained was trained for {last.step} steps, {last.tokens:,} tokens each."
    )
    shorter = said(full=10)
    assert shorter.startswith("Their budgets differ")
    assert f"full {point.step} steps, {point.tokens:,} tokens" in shorter


def test_trade_offs_and_tile_show_what_is_served(spec: PageSpec, inputs: Inputs) -> None:
    figures = inputs.reports["lora-r16"].figures()
    name = overhead_figure(inputs)
    assert figures[name] != figures[f"{name}_merged"]
    assert as_served(figures, name, merges=True) == figures[f"{name}_merged"]
    assert as_served(figures, name, merges=False) == figures[name]
    base = inputs.reports["base"].figures()
    assert as_served(base, name, merges=True) == base[name]
    shown = {
        merges: next(
            tile.value
            for tile in tiles(spec.model_copy(update={"merges": merges}), inputs)
            if tile.title == "Inference overhead"
        )
        for merges in (True, False)
    }
    assert shown[True] != shown[False]


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_has_a_title_and_a_direction(task: str) -> None:
    for metric, more_is_better in TASKS[task].metrics.items():
        assert KNOWN[metric].better == ("higher" if more_is_better else "lower"), metric


def test_rates_that_were_tried_are_shown_in_their_order(spec: PageSpec) -> None:
    [found] = rates(spec)
    assert (found.label, found.chosen) == ("lora-r4", "0.002")
    assert found.trials == [("0.001", "0.81"), ("0.002", "0.9"), ("0.1", "diverged")]


def test_one_candidate_alone_is_beside_nobody(spec: PageSpec, inputs: Inputs) -> None:
    alone = inputs.comparison.model_copy(
        update={"candidates": {"full": inputs.comparison.candidates["full"]}, "pairs": []}
    )
    assert apart(replace(inputs, comparison=alone)) is None
    assert recommendation(spec, replace(inputs, comparison=alone)) == []


def test_what_examples_cost_is_the_prefill(inputs: Inputs) -> None:
    assert overhead_figure(inputs) == "token_ratio_b1"
    shown = inputs.reports["lora-r4"].model_copy(update={"method": "few_shot"})
    with_examples = replace(inputs, reports=inputs.reports | {"lora-r4": shown})
    assert overhead_figure(with_examples) == "prefill_ratio_b1"


def test_candidates_that_train_nothing_have_no_curve(spec: PageSpec, inputs: Inputs) -> None:
    one = loss_plot(spec, replace(inputs, curves=inputs.curves | {"lora-r4": []}))
    assert one is not None
    assert {trace.get("name") for trace in one.spec["data"]} == {None, "full", "lora-r16"}
    none = replace(inputs, curves={label: [] for label in inputs.curves})
    assert loss_plot(spec, none) is None
    assert "No candidate has a training curve." in render(spec, none)


def test_a_prediction_stands_beside_what_was_measured(spec: PageSpec, inputs: Inputs) -> None:
    """In one unit a figure; the difference is of what was measured."""
    found = predicted(inputs)
    assert found is not None
    assert [label for label, _ in found.rows] == spec.labels
    weights, peak, flops = dict(found.rows)["lora-r16"]
    assert (weights.first, weights.second, weights.compared) == ("451,000", "451,000", "0")
    assert (peak.first, peak.second, peak.compared) == ("134", "119", "+12.5")
    assert flops.compared == "\u221225.0"
    assert [column.unit for column in found.columns] == ["", "MiB", "MFLOP"]
    assert "Predicted and measured" in render(spec, inputs)


def test_what_a_larger_base_would_change(spec: PageSpec, inputs: Inputs) -> None:
    found = on_larger(inputs)
    assert found is not None
    assert [column.name for column in found.columns] == list(SIZES)
    share, shipped, peak, flops = dict(found.rows)["lora-r16"]
    assert (share.compared, shipped.compared) == ("0.3", "1.0")
    assert (peak.first, peak.second, peak.compared) == ("134", "1,068", "8.0")
    assert flops.compared == "10.0"
    page = render(spec, inputs)
    assert "On a larger base" in page
    assert "35.7\u00a0M parameters" in page
    without = replace(inputs, larger={}, larger_parameters=0)
    assert on_larger(without) is None
    assert "On a larger base" not in render(spec, without)


def test_a_run_without_a_prediction_has_no_such_section(spec: PageSpec, inputs: Inputs) -> None:
    assert predicted(replace(inputs, costs={})) is None
    asked = {"zero_shot": inputs.costs["zero_shot"]}
    assert predicted(replace(inputs, costs=asked)) is None
    assert "Predicted and measured" not in render(spec, replace(inputs, costs={}))
