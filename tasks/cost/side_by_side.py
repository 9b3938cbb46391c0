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
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import TypeVar

from schemas.errors import StageError

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")


def side_by_side(works: Sequence[Callable[[], T]]) -> list[T]:
    """What each returns, in their order; as many at a time as this process may use cores.

    Raises:
        StageError: the first that raised something or was ended, when all are through.
    """
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or len(works) == 1:
        return [work() for work in works]
    answers: dict[int, T | StageError] = {}
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    while len(answers) < len(works):
        while len(running) < cores and (number := len(answers) + len(running)) < len(works):
            ours, theirs = FORK.Pipe(duplex=False)
            fork = FORK.Process(target=_answer, args=(works[number], theirs), daemon=True)
            fork.start()
            # The fork's alone, so that its end is the pipe's.
            theirs.close()
            running[ours] = number, fork
        for pipe in wait(list(running)):
            assert isinstance(pipe, Connection)
            number, fork = running.pop(pipe)
            answers[number] = _taken(pipe, fork)
    found: list[T] = []
    for _, answer in sorted(answers.items()):
        if isinstance(answer, StageError):
            raise answer
        found.append(answer)
    return found


def _answer(work: Callable[[], T], pipe: Connection) -> None:
    """In the fork. An exception is told in words, as not every one can be pickled."""
    try:
        pipe.send(work())
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        pipe.send(StageError(str(error) or type(error).__name__))


def _taken(pipe: Connection, fork: ForkProcess) -> T | StageError:  # type: ignore[type-var]
    """In its parent."""
    try:
        answer: T | StageError = pipe.recv()
    except EOFError:
        fork.join()
        code = fork.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"code {code}"
        answer = StageError(f"a candidate's plan was ended by {name} (out of memory?)")
    pipe.close()
    fork.join()
    return answer
