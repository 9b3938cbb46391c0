"""Finding or making one entry, and telling a listener how it goes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from flows.calls import Step
from flows.execute import Event, run_stage
from flows.fan_out import SLOT
from flows.home import Home
from flows.records import StageLine
from flows.remember import Diverged
from schemas.errors import DivergedError
from tasks.core.store import Entry, Store, key_of


class Listener(Protocol):
    """Whoever shows a run: the terminal, or Prefect's log."""

    def begin(self, step: Step) -> None:
        """A step starts, and is not in the store."""

    def event(self, step: Step, event: Event) -> None:
        """The stage reports progress, a note or a warning."""

    def end(self, step: Step, line: StageLine | None, entry: Entry | None) -> None:
        """The step has its entry; or has failed, and `line` and `entry` are None."""


@dataclass(frozen=True)
class Bench:
    """Where steps are made, and before whom."""

    home: Home
    listener: Listener
    offline: bool = True

    def make(self, step: Step) -> tuple[Entry, StageLine]:
        """The entry of a step: from the store, else made in a child process.

        Raises: as `flows.execute.run_stage`.
        """
        call, started = step.call, time.monotonic()
        diverged = Diverged(self.home.diverged)
        entry = Store(self.home.store).find(call)
        cached = entry is not None
        if entry is None:
            diverged.check(key_of(call))
            self.listener.begin(step)
            try:
                entry = run_stage(
                    call,
                    self.home,
                    lambda event: self.listener.event(step, event),
                    offline=self.offline,
                    slot=SLOT.get(),
                )
            except BaseException as error:
                self.listener.end(step, None, None)
                if isinstance(error, DivergedError):
                    diverged.put(key_of(call), error)
                raise
        made = entry.manifest.provenance.seconds
        seconds = made if cached else round(time.monotonic() - started, 3)
        line = StageLine(
            stage=call.stage, label=step.label, key=entry.key, cached=cached, seconds=seconds
        )
        self.listener.end(step, line, entry)
        return entry, line
