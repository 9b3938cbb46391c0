"""Works side by side: their slots, their failures, and what ends them all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import fan_out
from flows.execute import bound
from flows.fan_out import SLOT, slots
from schemas.errors import DiskFullError, StageError, UserError


def failing(error: Exception) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


def test_results_keep_the_order_of_the_works_and_failures_are_told() -> None:
    told: dict[str, str] = {}
    works = {"a": lambda: 1, "b": failing(StageError("no")), "c": lambda: 3}
    done = fan_out.fan_out(works, 3, lambda name, error: told.update({name: str(error)}))
    assert list(done.items()) == [("a", 1), ("c", 3)]
    assert told == {"b": "no"}


def test_so_many_run_at_once_and_each_in_a_slot_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three works that wait for each other end only if they run together."""
    monkeypatch.setattr(fan_out, "gpus", lambda: ["nvidia0", "nvidia1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    barrier = threading.Barrier(3, timeout=30)

    def work() -> dict[str, str] | None:
        barrier.wait()
        return SLOT.get()

    found = fan_out.fan_out(dict.fromkeys("abc", work), 3, lambda name, error: None)
    devices = sorted(slot["CUDA_VISIBLE_DEVICES"] for slot in found.values() if slot)
    assert devices == ["0", "0", "1"]
    assert SLOT.get() is None


def test_one_job_has_the_whole_machine_and_several_share_its_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fan_out, "gpus", list)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert slots(1) == [{}]
    assert slots(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert slots(16) == [{"OMP_NUM_THREADS": "1"}] * 16
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(3)] == ["GPU-a", "GPU-b", "GPU-a"]


def test_a_full_disk_is_nobodys_own_and_ends_all() -> None:
    works = {"a": lambda: 1, "b": failing(DiskFullError("full"))}
    with pytest.raises(DiskFullError):
        fan_out.fan_out(works, 1, lambda name, error: None)


def test_an_end_of_all_ends_the_stages_of_the_others(tmp_path: Path) -> None:
    """Each of the others would sleep for ten minutes, then for ten more."""
    started = threading.Barrier(3, timeout=60)

    def sleeping() -> None:
        for first in (True, False):
            command = [sys.executable, "-c", "import time; time.sleep(600)"]
            with bound(command, dict(os.environ), subprocess.DEVNULL) as child:
                if first:
                    started.wait()
                child.wait()

    def full() -> None:
        started.wait()
        raise DiskFullError("full")

    began = time.monotonic()
    with pytest.raises(DiskFullError):
        # The order of the works: what fails is waited for first.
        fan_out.fan_out({"c": full, "a": sleeping, "b": sleeping}, 3, lambda name, error: None)
    assert time.monotonic() - began < 120


def test_where_all_fail_every_problem_is_kept() -> None:
    users = {name: failing(UserError.at(name, "is wrong", "mend it")) for name in "ab"}
    with pytest.raises(UserError) as caught:
        fan_out.fan_out(users, 2, lambda name, error: None)
    assert [problem.place for problem in caught.value.problems] == ["a", "b"]
    mixed = {"a": failing(StageError("x")), "b": users["b"]}
    with pytest.raises(StageError, match="a: x\nb: b: is wrong"):
        fan_out.fan_out(mixed, 1, lambda name, error: None)
