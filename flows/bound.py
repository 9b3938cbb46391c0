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

PR_SET_PDEATHSIG = 1

#: Seconds between asking the group to end and making it.
GRACE_S = 4.0


def ask_group(_signal: int, _frame: object) -> None:
    """SIGTERM to the group, and SIGKILL to what is left of it when the grace is over."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: end_group())
    signal.setitimer(signal.ITIMER_REAL, GRACE_S)
    os.killpg(0, signal.SIGTERM)


def end_group() -> None:
    """SIGKILL to the group, this process included."""
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    # Before the child starts: at worst it is started after SIGTERM and ends when the grace does.
    signal.signal(signal.SIGTERM, ask_group)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 128 + signal.SIGKILL  # the parent died before the line above
    code = subprocess.Popen(command).wait()
    if signal.getsignal(signal.SIGTERM) is not ask_group:
        end_group()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
