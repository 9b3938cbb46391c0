"""What OpenMP's threads do while they wait for each other.

libgomp's wait is a spin of milliseconds, on a core that another process may want: a step of
15 ms took seconds on a busy machine. `OMP_WAIT_POLICY=passive` puts them to sleep at once, and
each of the thousands of small kernels of a step then waits for threads to wake. A spin of some
10 µs bridges the gap between two kernels and ends when nothing comes (docs/log.md has the figures).
"""

from __future__ import annotations

from collections.abc import Mapping

#: Turns of the spin.
BRIEFLY = {"GOMP_SPINCOUNT": "10000"}
NOT_AT_ALL = {"GOMP_SPINCOUNT": "0"}


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to a process's environment, before torch is imported: nothing where its user
    has decided. `GOMP_SPINCOUNT` would overrule `OMP_WAIT_POLICY`."""
    decided = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environment)
    return {} if decided else dict(BRIEFLY)
