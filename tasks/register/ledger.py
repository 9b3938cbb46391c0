"""The ledger of promotions: JSON lines that are only ever added to, and survive a crash.

Alias (in MLflow) and ledger (here) are two places, and a process can die between them. So the
entry is first written beside the ledger as an intent, then the alias is set, then the entry is
appended, then the intent removed. Whoever comes next, under the same lock, finds an intent and
asks the alias what became of it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from schemas.report import LedgerEntry
from tasks.core.files import fsync_path, write_atomic
from tasks.core.progress import warn
from tasks.register.registry import identity


class Ledger:
    """The promotions of one registered model, under `<home>/mlflow/ledger/<registry>/`.

    A name and a version mean something in one registry alone, so each has ledgers of its own.
    """

    def __init__(self, home: Path, name: str) -> None:
        self.directory = home / "mlflow" / "ledger" / identity(home)[:12]
        self.path = self.directory / f"{name}.jsonl"
        self.intent = self.directory / f"{name}.intent.json"
        self._lock = self.directory / f"{name}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One promoter at a time, on this home; the lock goes with the process."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def entries(self) -> list[LedgerEntry]:
        """Every whole line, oldest first. A last line cut by a crash is no entry."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [LedgerEntry.model_validate_json(line) for line in lines]

    def begin(self, entry: LedgerEntry) -> None:
        """Say what is about to be done. Under the lock, before the alias is set."""
        write_atomic(self.intent, entry.model_dump_json())

    def commit(self, entry: LedgerEntry) -> None:
        """Append the entry and forget the intent. Under the lock, after the alias was set."""
        self._cut_torn_line()
        with self.path.open("ab") as file:
            file.write(entry.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_path(self.directory)
        self.intent.unlink()
        fsync_path(self.directory)

    def recover(self, champion: str | None) -> None:
        """Finish or forget what a dead process began. Under the lock.

        champion: the version that the alias names now.
        """
        if not self.intent.exists():
            return
        try:
            entry = LedgerEntry.model_validate_json(self.intent.read_bytes())
        except ValidationError:
            warn(f"{self.intent} cannot be read and is set aside")
            os.replace(self.intent, self.intent.with_suffix(".bad"))
            return
        written = self.entries()
        if written and written[-1] == entry:
            self.intent.unlink()
        elif champion == entry.to_version:
            warn(f"{entry.name}: the last {entry.action} was cut short; its line is added now")
            self.commit(entry)
        else:
            warn(f"{entry.name}: the last {entry.action} was cut short and did not happen")
            self.intent.unlink()

    def _cut_torn_line(self) -> None:
        """Remove what a crash left of a line, which nobody has been told of."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            os.truncate(self.path, whole)
