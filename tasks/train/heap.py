"""How glibc is told to keep tensors, so that training holds little more than they are.

torch asks for every tensor at a multiple of 64 bytes. glibc cuts it out of a free piece that is
96 bytes larger, and the two scraps go to the next small things that are asked for. Freed, the
tensor leaves a hole that is a scrap too small for the next of its size, and the heap grows. So
scraps are not set aside for small things (no tcache, no fast bins) but join their hole again;
small things find a stock of pieces of their own, older than any scrap; the largest tensors have
mappings of their own; and the heap is in pages of 2 MiB, where the kernel gives them to who asks,
which pays for all of it. docs/log.md has the figures.

Nothing heavy is imported here: who starts the stage reads it too.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

NAME = "GLIBC_TUNABLES"
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
#: oneDNN keeps half a MiB for every product that it has compiled, 1,024 of them, and a pass with a
#: new number of tokens brings some 50. These are the products of a pass or two; to compile one
#: again takes 0.3 ms. An older name of the same variable counts as its user's word too.
COMPILED = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY")
PRODUCTS = "128"
#: Bytes from which a tensor has a mapping of its own, where pages are large: the cost of a fresh
#: mapping is small next to what is done with so many numbers.
OWN_MAPPING = 16 << 20
#: Bytes that a scrap may hold. glibc's pieces grow by 16, with 8 of its own in front.
SCRAPS = range(24, 120, 16)
#: Pieces in stock of each. glibc gives the oldest of a size first: with so many a scrap's turn does
#: not come while its tensor lives. 3,000 run out in the first step; 30,000 gain nothing.
STOCK = 10_000
#: glibc's names for `mallopt` (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that trains: glibc reads it as it starts, and
    oneDNN at its first product. Of what its user has decided, nothing."""
    heap = {} if NAME in given else {NAME: TUNABLES}
    products = {} if set(COMPILED) & set(given) else {COMPILED[0]: PRODUCTS}
    return heap | products


def arrange() -> None:
    """Keep what is freed, in one heap, instead of giving it back and faulting it in again.

    Activations come and go by the megabyte; without this a third of a CPU step is page faults.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return
    ours = os.environ.get(NAME) == TUNABLES
    mallopt(M_MMAP_THRESHOLD, OWN_MAPPING if ours else 1 << 30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_ARENA_MAX, 1)
    if ours:
        _stock(libc)


def _stock(libc: ctypes.CDLL) -> None:
    """Leave free pieces of every scrap's size in the heap, 8 MiB with what keeps them apart."""
    malloc, free = libc.malloc, libc.free
    malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    free.argtypes, free.restype = [ctypes.c_void_p], None
    pieces = []
    for size in SCRAPS:
        for _ in range(STOCK):
            pieces.append(malloc(size))
            malloc(SCRAPS.start)  # Stays, so that freed neighbours do not become one piece.
    for piece in pieces:
        free(piece)
