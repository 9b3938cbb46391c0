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
#: 40 rounds of 8 tensors of 4 MiB, behind each a thing of a scrap's size that stays for good.
PINS = """
import ctypes
import torch
from tasks.core.runtime import resident_mib
from tasks.train import heap
heap.arrange()
floor = resident_mib()
for _ in range(40):
    large = []
    for _ in range(8):
        large.append(torch.ones(2**20))
        ctypes.CDLL(None).malloc(ctypes.c_size_t(40))
    del large
print(resident_mib() - floor)
"""


def test_what_its_user_decided_stays():
    tunables, products = {heap.NAME: heap.TUNABLES}, {heap.COMPILED[0]: heap.PRODUCTS}
    assert heap.environment({}) == tunables | products
    assert heap.environment({"GLIBC_TUNABLES": "glibc.malloc.mxfast=64"}) == products
    assert heap.environment({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}) == tunables
    assert heap.environment({"DNNL_PRIMITIVE_CACHE_CAPACITY": "1024"}) == tunables


def test_freed_tensors_leave_room_for_the_next():
    """Twelve tensors live at a time (the new round beside the old one), 48 MiB."""
    # 1,200 small tensors and the allocator's own are under 16 MiB; 40 rounds would be 960.
    assert grown(ROUNDS) < 2 * 48 + 16


def test_what_stays_does_not_stand_between_freed_tensors():
    """Eight tensors live at a time, 32 MiB. A round that goes to the end of the heap, because a
    small thing stands in each of the last one's holes, takes as much again."""
    assert grown(PINS) < 32 + 16


def grown(code: str) -> float:
    """MiB that a process with its heap arranged grows by."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **heap.environment({}), "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)
