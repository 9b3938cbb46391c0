"""A process that trains has its heap arranged, unless its user has decided."""

from __future__ import annotations

import os
import subprocess
import sys

from tasks.train import heap

#: 40 rounds of 6 tensors of 4 MiB and as many small things that outlive them: what a pass makes.
ROUNDS = """
import torch
from tasks.core.runtime import resident_mib
from tasks.train import heap
heap.arrange()
small, floor = [], resident_mib()
for _ in range(40):
    large = []
    for _ in range(6):
        large.append(torch.ones(2**20))
        small += [torch.ones(n) for n in (1, 4, 8, 12, 16)]
print(resident_mib() - floor)
"""


def test_what_its_user_decided_stays():
    assert heap.environment({"GLIBC_TUNABLES": "glibc.malloc.mxfast=64"}) == {}
    assert heap.environment({}) == {"GLIBC_TUNABLES": heap.TUNABLES}


def test_freed_tensors_leave_room_for_the_next():
    """Twelve tensors live at a time (the new round beside the old one), 48 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS],
        env={**os.environ, **heap.environment({}), "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    # 1,200 small tensors and the allocator's own are under 16 MiB; 40 rounds would be 960.
    assert float(done.stdout) < 2 * 48 + 16
