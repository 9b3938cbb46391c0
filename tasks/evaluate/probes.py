"""The memory measurements, as processes that are started early and read late.

Nothing heavy is imported here, so that they run while the caller is still importing torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import StageError
from schemas.report import Memory
from schemas.stages import EvaluateSpec
from tasks.core.waiting import NOT_AT_ALL

#: Of each probe. Small next to what the caller needs, which works on meanwhile.
THREADS = max(1, len(os.sched_getaffinity(0)) // 4)

#: glibc keeps freed memory by a rule that learns as it goes, which moved the same peak by 15 %
#: from run to run; with the threshold fixed, tensors are given back when freed and the peak is
#: that of what is alive, to 0.3 MiB. Waiting threads sleep instead of holding the caller's cores.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": str(THREADS),
    **NOT_AT_ALL,
}


@dataclass(frozen=True)
class Probe:
    """A measuring process that has been started and not yet read."""

    process: subprocess.Popen[str]

    def peak_mib(self) -> float:
        """Wait for the process and read its figure, MiB."""
        out, err = self.process.communicate()
        if self.process.returncode != 0:
            raise StageError(f"the memory measurement failed:\n{err[-2000:]}")
        return float(json.loads(out.splitlines()[-1])["peak_mib"])


def start(spec: EvaluateSpec, paths: dict[str, Path]) -> dict[str, Probe]:
    """Start the measurement of the base, and of the subject where that is another model.

    They run beside the caller: memory, unlike time, does not depend on who else is at work.
    """
    calls = {"base": spec.model_copy(update={"subject": "base"}), "subject": spec}
    return {
        name: Probe(_spawn(call, paths))
        for name, call in calls.items()
        if name == "base" or spec.subject != "base"
    }


def stop(probes: dict[str, Probe]) -> None:
    """End the measurements that are still running: the caller has failed."""
    for probe in probes.values():
        if probe.process.poll() is None:
            probe.process.kill()
            probe.process.wait()


def read(probes: dict[str, Probe], training: dict[str, Any]) -> Memory:
    """The figures of the started measurements; the base is its own subject.

    training: the facts of the train entry, which has measured itself; empty where there is none.
    """
    base = probes["base"].peak_mib()
    trained = [name for name in Memory.model_fields if name.startswith("train_")]
    return Memory(
        **{name: training.get(name) for name in trained},
        generate_peak_mib=probes["subject"].peak_mib() if "subject" in probes else base,
        base_generate_peak_mib=base,
    )


def _spawn(spec: EvaluateSpec, paths: dict[str, Path]) -> subprocess.Popen[str]:
    named = {name: str(path.resolve()) for name, path in paths.items()}
    if spec.subject == "base":
        named.pop("subject", None)
    request: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "paths": named}
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # -P: a directory named `tasks` where the user stands must not be taken for ours.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "tasks.evaluate.memory", json.dumps(request)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": search, "PEFTFLOW_EVENTS": "0"},
    )
