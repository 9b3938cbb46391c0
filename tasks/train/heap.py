"""How glibc is told to keep tensors, so that training holds little more than they are.

torch asks for every tensor at a multiple of 64 bytes. glibc cuts it out of a free piece that is
96 bytes larger, and the two scraps go to the next small things that are asked for. Freed, the
tensor leaves a hole that is a scrap too small for the next of its size, and the heap grows. So
scraps are not set aside for small things (no tcache, no fast bins) but join their hole again; the
largest tensors have mappings of their own; and the heap is in pages of 2 MiB, where the kernel
gives them to who asks, which pays for all of it. docs/log.md has the figures.

Nothing heavy is imported here: who starts the stage reads it too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

NAME = "GLIBC_TUNABLES"
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
#: Bytes from which a tensor has a mapping of its own, where pages are large: the cost of a fresh
#: mapping is small next to what is done with so many numbers.
OWN_MAPPING = 16 << 20
#: glibc's names for `mallopt` (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that trains: glibc reads it as it starts.
    Nothing where its user has decided."""
    return {} if NAME in given else {NAME: TUNABLES}


def arrange() -> None:
    """Keep what is freed, in one heap, instead of giving it back and faulting it in again.

    Activations come and go by the megabyte; without this a third of a CPU step is page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(M_MMAP_THRESHOLD, OWN_MAPPING if os.environ.get(NAME) == TUNABLES else 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_ARENA_MAX, 1)
