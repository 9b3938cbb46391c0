"""Works in forks: their answers in order, and every way in which one can end."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from schemas.errors import StageError
from tasks.cost import side_by_side as module
from tasks.cost.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer forks than works, wherever the test runs."""
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {0, 1})


def test_answers_come_in_the_order_of_the_works_and_from_other_processes() -> None:
    answers = side_by_side([partial(lambda n: (n, os.getpid()), n) for n in range(7)])
    assert [number for number, _ in answers] == list(range(7))
    pids = {pid for _, pid in answers}
    assert os.getpid() not in pids
    assert len(pids) <= 2


@pytest.mark.parametrize("count", [0, 1])
def test_one_work_needs_no_fork(count: int) -> None:
    assert side_by_side([os.getpid] * count) == [os.getpid()] * count


def test_what_one_raises_comes_when_the_others_are_through(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def bad() -> int:
        raise KeyError("a bug")

    with pytest.raises(StageError, match="a bug"):
        side_by_side([lambda: 1, bad, lambda: 3, lambda: 4])
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_work_is_told(killed: int) -> None:
    def die() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    works = [die if n < killed else lambda: 1 for n in range(5)]
    with pytest.raises(StageError, match="SIGKILL"):
        side_by_side(works)
