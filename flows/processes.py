"""Processes by pid and start time, since a pid alone is given again to another one day."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Process(BaseModel):
    """A process of this machine. started: clock ticks since boot, from /proc/<pid>/stat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        return cls(pid=pid, started=_start_ticks(pid) or 0)

    @classmethod
    def this(cls) -> Process:
        return cls.of(os.getpid())

    @property
    def alive(self) -> bool:
        return _start_ticks(self.pid) == self.started

    def end_group(self, grace_s: float = 5.0) -> None:
        """End the process and those of its group: asked first, then made."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if not self.alive:
                return
            os.killpg(self.pid, sign)
            deadline = time.monotonic() + grace_s
            while self.alive and time.monotonic() < deadline:
                time.sleep(0.02)


def _start_ticks(pid: int) -> int | None:
    """When a process started, or None for one that is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold blanks
    return None if fields[0] == "Z" else int(fields[19])
