"""The artifact store: entries that are whole, hashed and never made twice.

    <root>/<stage>/<key>/            an entry; manifest.json was written last
    <root>/<stage>/.work-<key>/      being made; a killed run goes on from what it finds here
    <root>/<stage>/.bad-<key>-<n>/   an entry whose hashes no longer match, kept for a person

The key of an entry is the hash of all that decides its content (`Call`), so the same call
finds the same entry, and any change in what a stage reads makes a new one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from schemas.errors import DiskFullError, UserError
from schemas.manifest import FileRecord, Manifest
from schemas.stages import Call, keyed
from tasks.core.files import fsync_path, sha256_file, sha256_json, write_atomic
from tasks.core.progress import warn
from tasks.core.provenance import Stopwatch

MANIFEST = "manifest.json"

#: What a stage keeps in its work directory for itself. Not part of the entry.
SCRATCH = "scratch"

#: How libraries that raise no OSError (safetensors, polars, SQLite) tell of a full disk.
FULL = ("No space left on device", "Disk quota exceeded", "database or disk is full")


def key_of(call: Call) -> str:
    """The key of the entry that a call makes: 40 hexadecimal digits."""
    return sha256_json(
        {
            "stage": call.stage,
            "stage_version": call.stage_version,
            "spec": keyed(call.spec, call.unkeyed),
            "inputs": call.inputs,
            "outside": call.outside,
        }
    )[:40]


@dataclass(frozen=True)
class Entry:
    """A whole entry of the store."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest.facts


class Store:
    """Entries under one root directory, safe for several processes at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def find(self, call: Call) -> Entry | None:
        """The entry of this call, or None. One that is damaged is set aside, aloud."""
        stage, key = call.stage, key_of(call)
        path = self.path(stage, key)
        if not path.exists():
            return None
        problem = damage(path)
        if problem is None:
            return Entry(path, read_manifest(path))
        aside = self._aside(stage, key)
        os.replace(path, aside)
        warn(f"{stage} entry {key[:12]} is damaged ({problem}); set aside as {aside}, made again")
        return None

    def make(
        self, call: Call, run: Callable[[Path], dict[str, Any]], *, resumes: bool = False
    ) -> Entry:
        """The entry of this call: found, or made by `run(work_dir)`, which returns its facts.

        `run` may find files of an earlier, killed attempt in its directory, and `resumes` says
        that it goes on from them. What it leaves in `scratch/` is thrown away when the entry is
        sealed.

        Raises:
            UserError: from `run`, which leaves the store as it was; or the store cannot be
                written to.
            DiskFullError: no entry is changed; what this attempt has left is gone, unless the
                stage resumes.
        """
        key = key_of(call)
        with storage_errors(self.root):
            (self.root / call.stage).mkdir(parents=True, exist_ok=True)
            with self._lock(call.stage, key):
                found = self.find(call)
                if found is not None:
                    return found
                work = self.root / call.stage / f".work-{key}"
                fresh = not work.exists()
                work.mkdir(exist_ok=True)
                watch = Stopwatch()
                try:
                    self._seal(call, key, work, run(work), watch)
                except UserError:
                    # Checkpoints of an earlier attempt stay: the input may be put right again.
                    if fresh:
                        shutil.rmtree(work, ignore_errors=True)
                    raise
                except Exception as error:
                    # What nothing can go on from would only keep the disk full.
                    if is_full(error) and not resumes:
                        shutil.rmtree(work, ignore_errors=True)
                    raise
        return Entry(self.path(call.stage, key), read_manifest(self.path(call.stage, key)))

    def entries(self, stage: str = "*") -> Iterator[Entry]:
        """Every entry (of one stage) with a readable manifest, unchecked: for listings."""
        for path in sorted(self.root.glob(f"{stage}/[!.]*/{MANIFEST}")):
            try:
                manifest = read_manifest(path.parent)
            except (OSError, ValidationError):
                # Whoever needs this entry makes it again; others must not fail with it.
                warn(f"{path} cannot be read: its entry is left out")
                continue
            yield Entry(path.parent, manifest)

    def _seal(
        self, call: Call, key: str, work: Path, facts: dict[str, Any], watch: Stopwatch
    ) -> None:
        shutil.rmtree(work / SCRATCH, ignore_errors=True)
        (work / MANIFEST).unlink(missing_ok=True)
        files: dict[str, FileRecord] = {}
        for path in sorted(path for path in work.rglob("*") if path.is_file()):
            fsync_path(path)
            files[path.relative_to(work).as_posix()] = FileRecord(
                bytes=path.stat().st_size, sha256=sha256_file(path)
            )
        for directory in {path.parent for path in work.rglob("*")}:
            fsync_path(directory)
        manifest = Manifest(
            stage=call.stage,
            stage_version=call.stage_version,
            key=key,
            format=facts.pop("format", call.format),
            spec=call.spec,
            inputs=call.inputs,
            outside=call.outside,
            facts=json.loads(json.dumps(facts, allow_nan=False)),
            files=files,
            provenance=watch.provenance(),
        )
        write_atomic(work / MANIFEST, manifest.model_dump_json(indent=1))
        os.replace(work, self.path(call.stage, key))
        fsync_path(self.root / call.stage)

    def _aside(self, stage: str, key: str) -> Path:
        number = 0
        while (path := self.root / stage / f".bad-{key}-{number}").exists():
            number += 1
        return path

    @contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        """One maker of an entry at a time; the lock goes with the process, however it ends."""
        path = self.root / stage / f".lock-{key}"
        while True:
            with path.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_file(file.fileno(), path):
                    continue  # its last holder removed it while this process waited
                try:
                    yield
                finally:
                    path.unlink()
                return


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one that `path` names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def read_manifest(path: Path) -> Manifest:
    return Manifest.model_validate_json((path / MANIFEST).read_bytes())


def damage(path: Path) -> str | None:
    """What is wrong with an entry, in words, or None. Reads and hashes every file."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return "no manifest"
    except ValidationError:
        return "its manifest cannot be read"
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != record.bytes:
            return f"{name} has {file.stat().st_size} bytes, not {record.bytes}"
        if sha256_file(file) != record.sha256:
            return f"the hash of {name} differs"
    return None


def is_full(error: Exception) -> bool:
    """Whether an error says that no space is left, whichever library met it."""
    code = error.errno if isinstance(error, OSError) else None
    return code in (errno.ENOSPC, errno.EDQUOT) or any(words in str(error) for words in FULL)


@contextmanager
def storage_errors(root: Path) -> Iterator[None]:
    """Turn a full disk, or a file that may not be used, into words with a fix.

    Raises:
        DiskFullError: whatever library met it.
        UserError: `root`, or another file, may not be written or read.
    """
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if is_full(error):
            raise DiskFullError(f"{root}: the disk is full. {DiskFullError.FIX}") from error
        if isinstance(error, OSError) and code in (errno.EROFS, errno.EACCES, errno.EPERM):
            named = isinstance(error.filename, str | bytes)
            other = Path(os.fsdecode(error.filename)) if named else root
            if not (other.is_relative_to(root) or root.is_relative_to(other)):
                raise UserError.at(
                    other,
                    f"may not be used: {error.strerror}",
                    "make it readable to this user (and writable, where it is a cache)",
                ) from error
            raise UserError.at(
                root, "cannot be written to", "choose another place with --home DIR"
            ) from error
        raise
