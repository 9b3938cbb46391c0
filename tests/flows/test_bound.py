"""A bound child ends with its parent, however that ends, and takes what it started with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.execute import start_bound
from flows.processes import Process

#: Starts a grandchild that would sleep on, says both pids, and waits.
CHILD = """
import os, subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), grandchild.pid, flush=True)
time.sleep(600)
"""

PARENT = f"""
import os, sys, time
from flows.execute import start_bound
child = start_bound([sys.executable, "-c", {CHILD!r}], dict(os.environ), None, None)
time.sleep(600)
"""


def gone(pids: list[int], within_s: float = 10.0) -> bool:
    """Whether none of the processes is alive any more (a zombie is not)."""
    deadline = time.monotonic() + within_s
    watched = [Process.of(pid) for pid in pids]
    while any(process.alive for process in watched if process.started):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_the_whole_group_ends_when_the_parent_is_killed(sign: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(Process.of(pid).alive for pid in pids)
    parent.send_signal(sign)
    parent.wait()
    assert gone(pids)
    parent.stdout.close()


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    child = start_bound(
        [sys.executable, "-c", stubborn + "print('up', flush=True); time.sleep(600)"],
        dict(os.environ),
        subprocess.PIPE,
        None,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n"
    child.terminate()
    assert child.wait(timeout=20) == -signal.SIGKILL
    assert child.stdout.read() == b""  # nobody holds the pipe any more
    child.stdout.close()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(2)", 2),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_the_code_comes_through(tmp_path: Path, code: str, expected: int) -> None:
    child = start_bound([sys.executable, "-c", code], dict(os.environ), None, None)
    assert child.wait(timeout=20) == expected
