"""Fourteen candidates: an overview that fits, numbers in the plots, every pair of criteria."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from schemas.stages import PageSpec
from tasks.report.criteria import bare, criteria_table, overview
from tasks.report.figures import figure
from tasks.report.inputs import read_inputs
from tasks.report.overhead import latency_table
from tasks.report.pareto import label_positions
from tasks.report.plots import FEW, numbers, styles
from tasks.report.run import run
from tasks.report.trade_offs import other_pairs, trade_offs

Many = tuple[PageSpec, dict[str, Path]]


@pytest.fixture(scope="module")
def page(many: Many, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("page")
    run(*many, out_dir)
    return out_dir / "report.html"


def test_no_two_candidates_look_alike(many: Many) -> None:
    looks = styles(many[0])
    candidates = [looks[label] for label in many[0].labels]
    assert len({(look.colour, look.symbol) for look in candidates}) == 14
    assert len({(look.colour, look.dash) for look in candidates}) == 14


def test_the_overview_holds_the_figures_of_the_table(many: Many) -> None:
    spec, inputs = many[0], read_inputs(*many)
    groups = criteria_table(inputs, spec.labels)
    rows = overview(spec, inputs, groups)
    assert [row.names.split()[0] for row in rows] == [
        "exact_match",
        "retention_change",
        "shipped_bytes",
        "trainable_share",
        "train_peak_mib",
        "flops_ratio_to_full",
        "step_time_s",
        "token_ratio_b1",
    ]
    *alike, served = rows
    whole = [row for group in groups for row in group.rows]
    assert alike[0] in whole
    assert all(row in map(bare, whole) for row in alike[1:])
    [forgotten] = [row for row in whole if row.names == "retention_change"]
    assert all(cell.interval for cell in forgotten.cells)
    # Merged where it was measured so: not the row of the table, which is of unmerged adapters.
    assert served.title.endswith("as served")
    figures = [report.figures() for report in inputs.reports.values()]
    assert [cell and cell.value for cell in served.cells] == [
        one.get("token_ratio_b1_merged", one.get("token_ratio_b1")) for one in figures
    ]
    few = spec.model_copy(update={"labels": spec.labels[:FEW]})
    assert overview(few, inputs, groups) == []
    assert numbers(few) == {}


def test_every_pair_of_criteria_is_drawn_once(many: Many) -> None:
    spec, inputs = many[0], read_inputs(*many)
    first, others = trade_offs(spec, inputs), other_pairs(spec, inputs)
    assert [plot.id for plot in first] == [
        f"plot-{name}" for name in ("storage", "memory", "computation", "overhead", "retention")
    ]
    assert len(others) == 10
    assert len({plot.id for plot in others}) == 10
    memory = next(plot for plot in others if plot.id == "plot-memory-computation")
    assert memory.title == "Computation against memory"
    front, *points = memory.spec["data"]
    # No candidate needs less memory than this one, and none has the quicker step.
    assert (front["x"], front["y"]) == ([240.2], [133.0])
    assert {point["text"][0] for point in points} >= {"1", "13", "14"}
    assert "95 % interval" not in json.dumps(memory.spec)


def test_latencies_are_in_the_order_of_prompt_lengths(many: Many) -> None:
    inputs = read_inputs(*many)
    full = inputs.reports["full"]
    longer = [
        row.model_copy(update={"prompt_tokens": length})
        for length in (64, 256, 16)
        for row in full.inference_overhead
    ]
    full = full.model_copy(update={"inference_overhead": longer})
    [group] = latency_table(replace(inputs, reports={"full": full}))
    assert [(row.prompt_tokens, row.batch_size) for row in group.rows] == [
        (length, batch) for length in ("16", "64", "256") for batch in (1, 8)
    ]
    names = [row.cells[0].name for row in group.rows[::2]]
    assert names == ["prefill_p50_ms_b1_p16", "prefill_p50_ms_b1", "prefill_p50_ms_b1_p256"]
    assert set(names) < set(full.figures())
    assert figure("prefill_ratio_b1").title == "Prefill, batch 1"
    assert figure("prefill_ratio_b1_p256_merged").title == "Prefill, batch 1, 256 tokens, merged"


def test_a_label_goes_where_nothing_is() -> None:
    """A point in the middle of others: the one place that they leave is above it."""
    points = [(0.5, 0.5), (0.55, 0.5), (0.53, 0.43), (0.5, 0.43), (0.45, 0.43), (0.44, 0.5)]
    points += [(0.44, 0.57), (0.56, 0.57)]
    assert label_positions(points, ["7", *[""] * 7])[0] == "top center"


@pytest.mark.parametrize("width", [800, 1280])
def test_many_candidates_in_a_browser(browser: Any, page: Path, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.devtools("Emulation.setDeviceMetricsOverride", **size)
    browser.errors()
    browser.open(page)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    visible = browser.run(
        "const table = document.querySelector('.overview');"
        "return table.scrollWidth <= table.parentElement.clientWidth"
    )
    assert visible == (width == 1280)
    # Folded plots are drawn when they are opened, as wide as the others.
    drawn = "return document.querySelectorAll('#pairs .main-svg').length"
    assert browser.run(drawn) == 0
    browser.run("document.getElementById('pairs').open = true")
    deadline = time.monotonic() + 60
    while browser.run("return document.querySelectorAll('#pairs .modebar').length") < 10:
        assert time.monotonic() < deadline, "the folded plots were not drawn"
        time.sleep(0.1)
    widths = browser.run(
        "return [...document.querySelectorAll('.grid .plot .main-svg')]"
        ".map(svg => svg.clientWidth).filter(width => width)"
    )
    assert min(widths) > 200
    assert browser.errors() == []
    browser.devtools("Emulation.clearDeviceMetricsOverride")
