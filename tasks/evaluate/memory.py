"""Criterion 2, memory: peak while generating, of a process that does nothing else.

`python -m tasks.evaluate.memory JSON` is that process: one loads the subject, another the base,
and both do the same fixed work. On a GPU the figure is the allocator's peak. On a CPU it is the
kernel's peak resident set (VmHWM) minus the floor: what was resident before the weights were
loaded, with every module imported, the model class built once without storage, and the thread
pool started, so that code is in the floor and weights, cache and activations are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import StageError
from schemas.report import Memory
from schemas.stages import EvaluateSpec
from tasks.core import runtime
from tasks.core.models import MODEL_CLASSES, load_config
from tasks.core.tokens import TokenRows
from tasks.evaluate import workload
from tasks.evaluate.batches import by_length, pad_id_of, right_padded, run_on
from tasks.evaluate.generate import generate_batch
from tasks.evaluate.subject import read_subject


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


def read(probes: dict[str, Probe], train_peak_mib: float | None) -> Memory:
    """The figures of the started measurements; the base is its own subject."""
    base = probes["base"].peak_mib()
    return Memory(
        train_peak_mib=train_peak_mib,
        generate_peak_mib=probes["subject"].peak_mib() if "subject" in probes else base,
        base_generate_peak_mib=base,
    )


def how(spec: EvaluateSpec) -> str:
    """The measurement in words."""
    if spec.task == "causal-lm":
        work = (
            f"{max(spec.evaluate.batch_sizes)} prompts of {spec.evaluate.prompt_tokens} tokens, "
            f"{spec.evaluate.max_new_tokens} new tokens each, none stopping early"
        )
    else:
        work = "the largest batch of test rows"
    figure = (
        "CUDA allocator's peak"
        if torch.cuda.is_available()
        else "peak resident set minus what was resident before loading, modules imported"
    )
    return (
        f"generating: {figure}, in a process of its own for subject and base each; work: {work}. "
        "Training: as measured by the train stage"
    )


def peak_of_call(spec: EvaluateSpec, paths: dict[str, Path]) -> float:
    """Load the subject in this process, do the fixed work, and return its peak, MiB."""
    subject = read_subject(spec, paths)
    rows = TokenRows.load(paths["prepared"] / "tokens" / "test.safetensors")
    device = runtime.device()
    settle(subject.whole_dir, spec)
    runtime.peak_reset()
    floor = 0.0 if torch.cuda.is_available() else runtime.resident_mib()
    model = subject.load().to(device)
    if spec.task == "causal-lm":
        new = spec.evaluate.max_new_tokens
        length = workload.prompt_length(model, spec.evaluate.prompt_tokens, new)
        block = workload.prompts(rows, max(spec.evaluate.batch_sizes), length)
        with torch.inference_mode():
            generate_batch(model, block, frozenset(), new)
    else:
        groups = by_length(rows.lengths)
        largest = max(groups, key=lambda group: len(group) * rows.lengths[group[0]])
        batch = right_padded([rows.row(index) for index in largest], pad_id_of(model))
        with torch.inference_mode():
            run_on(model, batch)
    return runtime.peak_mib() - floor


def settle(model_dir: Path, spec: EvaluateSpec) -> None:
    """Bring in all code that loading and running will need, and none of the weights."""
    import peft  # noqa: F401  (loading an adapter imports it)

    with torch.device("meta"):
        MODEL_CLASSES[spec.task].from_config(load_config(model_dir))
    square = torch.ones(256, 256, dtype=runtime.TORCH_DTYPES[spec.dtype])
    torch.mm(square, square)


def _spawn(spec: EvaluateSpec, paths: dict[str, Path]) -> subprocess.Popen[str]:
    named = {name: str(path.resolve()) for name, path in paths.items()}
    if spec.subject == "base":
        named.pop("subject", None)
    request: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "paths": named}
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.evaluate.memory", json.dumps(request)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": search, "PEFTFLOW_EVENTS": "0"},
    )


if __name__ == "__main__":
    call = json.loads(sys.argv[1])
    figure = peak_of_call(
        EvaluateSpec.model_validate(call["spec"]),
        {name: Path(path) for name, path in call["paths"].items()},
    )
    print(json.dumps({"peak_mib": figure}))
