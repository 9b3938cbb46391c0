"""Answers that are dear to find and cheap to keep, in small JSON files under `cache/`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from schemas.errors import DivergedError
from tasks.core.files import sha256_file, sha256_json, write_atomic

#: A file changed this recently may change again within the resolution of its time stamp.
SETTLED_S = 2.0


class Memory:
    """A dictionary in one JSON file. A lost or broken file is an empty one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def get(self, key: str) -> Any:
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        self.update({key: value})

    def update(self, values: dict[str, Any]) -> None:
        self._known |= values
        write_atomic(self._path, json.dumps(self._known, indent=0))


class Diverged:
    """Trainings that diverged, by key: they would again, and need not be tried to know it.

    A file for each, since several are told of at once.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self, key: str) -> None:
        """Raise the DivergedError that a training of this key ended with."""
        path = self._directory / f"{key}.txt"
        if path.exists():
            raise DivergedError(path.read_text())

    def put(self, key: str, error: DivergedError) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self._directory / f"{key}.txt", str(error))


class FileHashes:
    """SHA-256 of files, computed again only when size, time or inode of a file has changed."""

    def __init__(self, path: Path) -> None:
        self._memory = Memory(path)

    def of_file(self, path: Path) -> str:
        [digest] = self._digests([path])
        return digest

    def of_files(self, paths: list[Path]) -> str:
        """One hash of several files' names and contents. Where they lie does not count."""
        return sha256_json({path.name: self.of_file(path) for path in paths})

    def unread(self, paths: list[Path]) -> int:
        """Bytes that would have to be read to hash these files."""
        return sum(path.stat().st_size for path in paths if self._remembered(path) is None)

    def of_named(self, names: list[str], root: Path) -> str:
        """One hash of files that are named relative to `root`, and of which are not there."""
        paths = {name: root / name for name in names}
        there = [name for name, path in paths.items() if path.is_file()]
        digests = self._digests([paths[name] for name in there])
        found: dict[str, str | None] = dict.fromkeys(names)
        return sha256_json(found | dict(zip(there, digests, strict=True)))

    def _digests(self, paths: list[Path]) -> list[str]:
        """The hash of each file; what is new is remembered at once, in one write."""
        digests: list[str] = []
        fresh: dict[str, Any] = {}
        for path in paths:
            known = self._remembered(path)
            if known is not None:
                digests.append(known)
                continue
            stamp = self._stamp(path)
            digests.append(sha256_file(path))
            if time.time() - path.stat().st_mtime > SETTLED_S:
                fresh[str(path)] = [*stamp, digests[-1]]
        if fresh:
            self._memory.update(fresh)
        return digests

    def _remembered(self, path: Path) -> str | None:
        known = self._memory.get(str(path))
        return str(known[3]) if known is not None and known[:3] == self._stamp(path) else None

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ino]
