"""The directory that an export makes: whole or absent."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import DiskFullError, UserError
from tasks.core.files import fsync_path
from tasks.core.store import is_full


@contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A directory beside `out` to write to, which becomes `out` at the end.

    What a killed export left beside it is cleared by the next one to the same place.

    Raises:
        UserError: `out` is there and not empty, may not be written, or is being written.
        DiskFullError: whatever library met it; nothing is left.
    """
    refuse_used(out)
    work = out.with_name(f".{out.name}.partial")
    try:
        with errors_of(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(exist_ok=True)
            with locked(work, out):
                for left in work.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                yield work
                for path in work.rglob("*"):
                    fsync_path(path)
                fsync_path(work)
                refuse_used(out)
                os.rename(work, out)
                fsync_path(out.parent)
    except BusyError as error:
        raise UserError.at(out, "another export is writing it", "wait for it to end") from error
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


class BusyError(Exception):
    """Somebody else's work directory, which stays."""


def refuse_used(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise UserError.at(
            out, "is there already, and not an empty directory", "name a new directory"
        )


@contextmanager
def locked(work: Path, out: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process."""
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def errors_of(out: Path) -> Iterator[None]:
    """A full disk, or a place that may not be written, in words."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise DiskFullError(
                f"{out}: the disk is full, and nothing was left there. Free some space or name "
                "another directory, and export again."
            ) from error
        refused = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
        if isinstance(error, OSError) and error.errno in refused:
            raise UserError.at(
                error.filename or out,
                f"may not be used: {error.strerror}",
                "let this user read it, or name an OUT that this user may write",
            ) from error
        raise
