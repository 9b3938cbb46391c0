"""What `dtype: auto` means on this machine, without importing torch on every start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Literal

from flows.execute import ROOT
from flows.home import Home
from flows.remember import Memory
from schemas.errors import StageError
from tasks.core.files import sha256_json

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16"}

PROBE = "from tasks.core.runtime import resolve_dtype; print(resolve_dtype('auto'))"


def resolve_dtype(wanted: str, home: Home) -> Dtype:
    """`tasks.core.runtime.resolve_dtype`, asked in a child process once for each machine.

    Torch itself gives the answer, so the two cannot differ; it is kept under what it depends on:
    the processor's features, the GPUs, torch's version, and the variables that choose a device.
    """
    known = known_dtype(wanted, home)
    if known is not None:
        return known
    environment = home.environment() | {"PYTHONPATH": str(ROOT)}
    probe = subprocess.run(
        [sys.executable, "-P", "-c", PROBE], env=environment, capture_output=True, text=True
    )
    return remember_dtype(probe.stdout.strip(), home, lambda: probe.stderr[-2000:])


def remember_dtype(answer: str, home: Home, why: Callable[[], str]) -> Dtype:
    """What torch said is the dtype. why: what a process said that gave no answer."""
    if answer not in DTYPES:
        raise StageError(f"torch cannot be asked for its data types:\n{why()}")
    _memory(home).put(f"dtype {fingerprint()}", answer)
    return DTYPES[answer]


def known_dtype(wanted: str, home: Home) -> Dtype | None:
    """The same where torch need not be asked, else None."""
    if wanted != "auto":
        return DTYPES[wanted]
    return DTYPES.get(_memory(home).get(f"dtype {fingerprint()}"))


def _memory(home: Home) -> Memory:
    return Memory(home.cache / "machine.json")


def gpus() -> list[str]:
    """The GPUs that the kernel shows, by the names of their devices."""
    return sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))


def torch_version() -> str:
    """Torch's version, which says what it was built for, without importing it.

    Raises:
        StageError: it is not installed.
    """
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise StageError("torch is not installed") from error


def fingerprint() -> str:
    """A hash of all that the answer depends on."""
    flags = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features", "model name")):
                flags.add(line)
    return sha256_json(
        {
            "processor": sorted(flags),
            "gpus": gpus(),
            "torch": torch_version(),
            "variables": {
                name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "PEFTFLOW_DEVICE")
            },
        }
    )
