"""What people see while a run works: bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console

from flows.calls import Step
from flows.screen import Screen
from schemas.stages import Call

STEP = Step(Call(stage="train", stage_version=1, format="rows", spec={}, paths={}), "lora-r4")


def told(console: Console, clock: list[float]) -> str:
    """Four of ten steps reported, one a second by the given clock; what was printed by then."""
    screen = Screen(console)
    screen.begin(STEP)
    if screen._progress is not None:
        screen._progress.live.auto_refresh = False  # the clock below moves only when told
        screen._progress.get_time = lambda: clock[0]
    for done in range(5):
        screen.event(STEP, progress(done))
        clock[0] += 1.0
    screen.event(STEP, {"event": "note", "message": "a note", "label": ""})
    if screen._progress is not None:
        screen._progress.refresh()
    screen.end(STEP, None, None)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def progress(done: int) -> dict[str, object]:
    return {
        "event": "progress",
        "label": "training",
        "done": done,
        "total": 10,
        "unit": "steps",
        "figures": {"loss": 1.5},
    }


def test_a_terminal_shows_rate_time_left_and_figures() -> None:
    console = Console(force_terminal=True, file=StringIO(), width=160)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told(console, [0.0]))
    bars = [line for line in shown.splitlines() if "4/10 steps" in line]
    assert bars, shown
    assert "training" in bars[-1]
    assert "1 steps/s" in bars[-1]  # one a second by the clock of the test
    assert re.search(r"\b00:06\b", bars[-1])  # six of ten are left
    assert "loss 1.5" in bars[-1]
    assert "train lora-r4: a note" in shown


def test_without_a_terminal_there_are_lines_and_no_control_codes() -> None:
    console = Console(file=StringIO(), width=160)
    shown = told(console, [0.0])
    assert shown.splitlines() == [
        "  train lora-r4: a note",
        "✗ train lora-r4                failed",
    ]
    assert "\x1b" not in shown
    assert "\r" not in shown
