"""Progress and plain words from a stage to whoever runs it.

A stage may run bare on a terminal or as a child of a flow. It says the same things either way;
`PEFTFLOW_EVENTS=1` makes them JSON lines on standard output, which the flow turns into bars.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds between two reports of the same bar: often enough to feel live, cheap enough to ignore.
EVERY_S = 0.2


def emit(event: dict[str, object]) -> None:
    """Send one event: as JSON to a parent flow, as a line of text to a terminal."""
    if os.environ.get("PEFTFLOW_EVENTS") == "1":
        print(json.dumps(event), flush=True)
    elif event["event"] == "progress":
        done, total, unit = event["done"], event["total"], event["unit"]
        print(f"{event['label']}: {done}/{total} {unit}", file=sys.stderr, flush=True)
    else:
        print(f"{event['event']}: {event['message']}", file=sys.stderr, flush=True)


def say(message: str) -> None:
    """One fact worth a line."""
    emit({"event": "note", "message": message})


def warn(message: str) -> None:
    """Something that is not wrong enough to stop and not right enough to be silent about."""
    emit({"event": "warning", "message": message})


class Bar:
    """Counts work of a known size. `advance` is cheap; what it shows is limited in rate."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.figures: dict[str, float] = {}
        self._shown = 0.0

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Count `amount` more; `figures` (e.g. loss=1.2) are shown beside the bar."""
        self.done += amount
        self.figures.update(figures)
        now = time.monotonic()
        pause = EVERY_S if os.environ.get("PEFTFLOW_EVENTS") == "1" else 2.0
        if now - self._shown >= pause or self.done >= self.total:
            self._shown = now
            self._emit()

    def _emit(self) -> None:
        emit(
            {
                "event": "progress",
                "label": self.label,
                "done": self.done,
                "total": self.total,
                "unit": self.unit,
                "figures": self.figures,
            }
        )


@contextmanager
def bar(label: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """A bar over `total` units of work, `done` of which were done before (a resumed run)."""
    yield Bar(label, total, unit, done)
