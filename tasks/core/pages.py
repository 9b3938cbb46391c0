"""Large tensors in pages of 2 MiB, where the kernel gives them to who asks.

A tensor with a mapping of its own goes back to the kernel when it is freed, so that training
holds its tensors and no holes between them. In pages of 4 KiB such a mapping costs 256 faults a
MiB; in large ones it costs no more than memory that is kept (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: torch asks for large pages where this is set before its first tensor.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def are_large(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment has them: it asks, and the kernel gives."""
    asked = environment.get("THP_MEM_ALLOC_ENABLE") == "1"
    return asked and KERNEL.is_file() and "[never]" not in KERNEL.read_text()
