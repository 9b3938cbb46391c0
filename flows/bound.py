"""Run a command that ends when its parent ends, with all that it started.

    python bound.py PARENT_PID COMMAND...

A process that is killed with SIGKILL cannot tidy up after itself. So each child of a run is
started through this small supervisor in a process group of its own: the kernel sends it SIGTERM
when the parent dies (prctl(2), PR_SET_PDEATHSIG), and it takes the whole group with it.
Imports nothing of ours and runs under `python -I -S`, so it costs about 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1

#: Seconds between asking the group to end and making it.
GRACE_S = 4.0


def end_group(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it: this process included."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    ended = False

    def on_term(_signal: int, _frame: object) -> None:
        nonlocal ended
        ended = True
        if child is not None:
            end_group(child)

    child: subprocess.Popen[bytes] | None = None
    signal.signal(signal.SIGTERM, on_term)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 128 + signal.SIGKILL  # the parent died before the line above
    child = subprocess.Popen(command)
    if ended:
        end_group(child)
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
