"""Works side by side, each in a fork of this process, which has imported all that they need.

A fork has the thread that it was made by and no other. So it is for works that need none: no
OpenMP team (`torch.set_num_threads(1)` before the first operation) and no GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from schemas.errors import StageError

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")


def side_by_side(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each returns, in their order; as many at a time as this process may use cores.

    Raises:
        StageError: the first that raised something or was ended, when all are through.
    """
    forks = min(len(os.sched_getaffinity(0)), len(works))
    if forks == 1:
        return [work() for work in works]
    left = iter(range(len(works)))
    answers: dict[int, T | StageError] = {}
    busy: dict[Connection, tuple[int, ForkProcess]] = {}
    started: list[ForkProcess] = []
    for _, number in zip(range(forks), left, strict=False):
        ours, theirs = FORK.Pipe()
        fork = FORK.Process(target=_serve, args=(works, theirs), daemon=True)
        fork.start()
        started.append(fork)
        # The fork's alone, so that its end is the pipe's.
        theirs.close()
        ours.send(number)
        busy[ours] = number, fork
    while busy:
        for pipe in wait(list(busy)):
            assert isinstance(pipe, Connection)
            number, fork = busy.pop(pipe)
            answers[number] = _taken(pipe, fork)
            following = next(left, None)
            with suppress(OSError):  # it was ended
                pipe.send(following)
                if following is not None:
                    busy[pipe] = following, fork
    for fork in started:
        fork.join()
    found: list[T] = []
    for _, answer in sorted(answers.items()):
        if isinstance(answer, StageError):
            raise answer
        found.append(answer)
    return found


def _serve(works: Sequence[Callable[[], T]], pipe: Connection) -> None:
    """In a fork: the works that it is told of, until its parent has no more. An exception is told
    in words, as not every one can be pickled."""
    with suppress(EOFError, OSError):  # its parent was ended
        while True:
            number = pipe.recv()
            if number is None:
                return
            try:
                pipe.send(works[number]())
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                pipe.send(StageError(str(error) or type(error).__name__))


def _taken(pipe: Connection, fork: ForkProcess) -> Any:
    """In the parent: an answer, or how the fork ended without one."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        fork.join()
        code = fork.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        return StageError(f"the plan of a candidate was ended by {name} (out of memory?)")
