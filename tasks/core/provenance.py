"""Where, when and with what something was made: the record in every manifest and benchmark."""

from __future__ import annotations

import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from schemas.manifest import Provenance

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
    "datasets",
    "polars",
    "pandera",
    "prefect",
    "mlflow",
    "bitsandbytes",
    "trl",
)


class Stopwatch:
    """Started when made; `provenance` stamps what was done since."""

    def __init__(self) -> None:
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()

    def provenance(self) -> Provenance:
        commit, dirty = git_state()
        return Provenance(
            started=self._started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._clock, 3),
            machine=machine(),
            python=platform.python_version(),
            libraries=libraries(),
            git_commit=commit,
            git_dirty=dirty,
        )


def machine() -> str:
    """The processor in words, with the number of cores that this process may use."""
    import os

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def libraries() -> dict[str, str]:
    """The versions of the libraries that decide results, where they are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(ignore: str = "") -> tuple[str | None, bool | None]:
    """The commit of the checkout that holds this file, and whether it has changes.

    ignore: a directory of the checkout whose changes do not count.
    """
    root = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        where = [":/", f":(exclude,top){ignore}"] if ignore else [":/"]
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--", *where],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changes.strip())
