"""A process is told from a later one with the same pid."""

from __future__ import annotations

import os
import subprocess
import sys

from flows.processes import Process


def test_this_process_is_alive() -> None:
    assert Process.this().alive


def test_the_same_pid_with_another_start_is_another_process() -> None:
    this = Process.this()
    assert not Process(pid=this.pid, started=this.started + 1).alive


def test_a_process_that_ended_is_not_alive_not_even_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = Process.of(child.pid)
    assert process.alive
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
    assert not process.alive
    child.wait()
    assert not process.alive


def test_a_group_is_ended() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    process = Process.of(child.pid)
    process.end_group()
    assert not process.alive
    child.wait()
