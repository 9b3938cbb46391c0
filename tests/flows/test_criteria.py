"""The table of the five criteria: every name and every figure is whole in 100 columns."""

from __future__ import annotations

import io

from rich.console import Console

from flows.criteria import criteria_table
from flows.records import RunRecord, Subject

#: As long as the labels that recipes give by themselves.
NAMES = [
    *(f"lora-r{rank}" for rank in (4, 8, 16, 32, 64)),
    *("full", "ia3", "layer_norm", "bitfit"),
    *("bottleneck-double_sequential-16", "bottleneck-sequential-16", "bottleneck-parallel-16"),
    *("prompt_tuning-20", "prefix_tuning-20"),
]


def subject(label: str, number: int, merged: str = "") -> Subject:
    """Candidate `number` is better than those before it at all but the goal."""
    return Subject(
        label=label,
        method=label,
        storage={},
        memory={},
        computation={},
        accuracy={
            "metrics": {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6}},
            "retention_change": {"value": 0.3, "low": 0.2, "high": 0.5},
        },
        inference_overhead=[],
        figures={
            "exact_match": 0.95 - number / 100,
            "retention_change": number / 10,
            "shipped_bytes": (1450.21 - number) * 2**20,
            "trainable_share": 1 - number / 100,
            "train_peak_mib": 12345 - number,
            "flops_ratio_to_full": 1 - number / 50,
            f"prefill_ratio_b1{merged}": 2.65 - number / 50,
            f"token_ratio_b1{merged}": 2.65 - number / 50,
            f"prefill_ratio_b8{merged}": 7.77,
        },
    )


def lines_of(count: int, goal: str | None = "exact_match") -> list[str]:
    found = [subject(name, number) for number, name in enumerate(NAMES[:count])]
    record = RunRecord(run_id="r", recipe="r", name="r", candidates=found, selected=NAMES[0])
    record.base, record.goal = subject("base", 0), goal
    record.finished = subject("finished", 0, merged="_merged")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(criteria_table(record))
    return console.export_text().splitlines()


def test_many_candidates_are_rows_and_nothing_is_cut() -> None:
    lines = lines_of(len(NAMES))
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows[-16:]] == ["base", *NAMES, "finished"]
    first, last = rows[-15], rows[-2]
    assert first[1:3] == ["0.9500", "±0.100★"]
    assert last[3:] == ["1,437.21★", "87.00★", "12,332★", "0.74★", "2.39★", "2.39★"]
    # The finished model was timed merged alone.
    assert rows[-1][-2:] == ["2.65", "2.65"]


def test_few_candidates_stand_side_by_side_with_every_figure() -> None:
    lines = lines_of(2)
    heading = next(line for line in lines if NAMES[0] in line)
    assert heading.split() == ["base", NAMES[0], NAMES[1], "finished"]
    assert any("prefill, batch 8" in line and "7.77" in line for line in lines)
    [forgot] = [line for line in lines if "retention, Δ loss" in line]
    assert "+0.000 ±0.150 " in forgot
    assert "+0.100 ±0.150 " in forgot


def test_a_goal_that_is_no_metric_leaves_the_task_s_own() -> None:
    assert any("exact_match" in line for line in lines_of(len(NAMES), goal="shipped_bytes"))
