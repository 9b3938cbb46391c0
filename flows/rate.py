"""How fast this machine multiplies, and what `dtype: auto` means on it: one process tells both."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from flows.execute import bound, tell_child
from flows.home import Home
from flows.machine import fingerprint, known_dtype, remember_dtype
from flows.remember import Memory
from schemas.errors import StageError
from tasks.core.files import sha256_json

#: Of a dtype, FLOP/s.
Rate = Callable[[str], float]


@contextmanager
def rates(wanted: str, home: Home) -> Iterator[Rate]:
    """`tasks.cost.calibrate`, once for each machine. Its process imports while others work, and
    measures when it is asked. wanted: the recipe's dtype, which is known to `home` from then on.

    Raises:
        StageError: torch is not there, or fails.
    """
    dtype = known_dtype(wanted, home)
    known = None if dtype is None else _memory(home).get(_key(dtype))
    if isinstance(known, float):
        yield lambda _: known
        return
    command = [sys.executable, "-P", "-m", "tasks.cost.calibrate"]
    with (
        tempfile.TemporaryFile() as errors,
        bound(command, home.environment(), errors, subprocess.PIPE) as child,
    ):
        assert child.stdout is not None
        words = child.stdout
        if dtype is None:
            remember_dtype(words.readline().decode().strip(), home, lambda: _told(errors))

        def measured(dtype: str) -> float:
            tell_child(child, dtype)
            lines = words.read().split()
            if child.wait() != 0:
                raise StageError(f"products cannot be timed:\n{_told(errors)}")
            rate = float(lines[-1])
            _memory(home).put(_key(dtype), rate)
            return rate

        yield measured


def _memory(home: Home) -> Memory:
    return Memory(home.cache / "machine.json")


def _key(dtype: str) -> str:
    return f"products in {dtype} {fingerprint()} {sha256_json(os.cpu_count())[:8]}"


def _told(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read()[-2000:].decode(errors="replace")
