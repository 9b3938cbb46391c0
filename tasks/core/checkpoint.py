"""Checkpoints from which a killed run ends in the same bytes as one never killed.

    scratch/checkpoint-00000012/
        tensors.safetensors   trained weights, optimiser and method's state, torch's random states
        state.json            step, tokens, curve, Python's and NumPy's random states, threads
        hashes.json           SHA-256 of the two, written last

A checkpoint is written beside its place, synced and renamed, and the one before is kept until
the one after is whole, so that at any moment one of them is. Nothing is pickled. The learning
rate and the rows of a step are functions of the step number, which is therefore the whole
state of the scheduler and of the data.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from schemas.report import CurvePoint
from tasks.core.files import canonical_json, fsync_path, sha256_file
from tasks.core.progress import say, warn

TENSORS, STATE, HASHES = "tensors.safetensors", "state.json", "hashes.json"
KEEP = 2


@dataclass
class RunState:
    """Where a run is. step: optimiser steps done; tokens: seen so far, padding excluded."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[CurvePoint] = field(default_factory=list)


class Remembers(Protocol):
    """What a run keeps beside its weights and optimiser (`tasks.methods.course.Course`)."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def restore(self, state: dict[str, torch.Tensor]) -> None: ...


class Checkpoints:
    """The checkpoints of one run in one directory.

    identity: a hash of all that decides the run's result; those of another run are not used.
    threads: with which the run began, or else those of this process. Sums depend on them.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self.directory = directory
        self.identity = identity
        self._newest = self._find_newest()
        self.threads = torch.get_num_threads()
        if self._newest is not None and (began := self._newest[1]["threads"]) != self.threads:
            warn(f"this run began with {began} threads, not {self.threads}, and goes on with them")
            self.threads = began

    def save(
        self,
        state: RunState,
        weights: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        course: Remembers,
    ) -> None:
        """Write one checkpoint, whole or not at all, and drop all but the last two."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._clear_unfinished()
        work = self.directory / f".unfinished-{os.getpid()}"
        work.mkdir()
        tensors = {f"weight/{name}": weight.detach() for name, weight in weights.items()}
        for index, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
        tensors |= {f"course/{name}": value for name, value in course.state().items()}
        tensors |= _torch_rng_states()
        save_file({name: value.contiguous() for name, value in tensors.items()}, work / TENSORS)
        record = {
            "identity": self.identity,
            "threads": self.threads,
            "step": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "curve": [point.model_dump() for point in state.curve],
            "rng": _host_rng_states(),
        }
        (work / STATE).write_text(canonical_json(record))
        hashes = {name: sha256_file(work / name) for name in (TENSORS, STATE)}
        for name in (TENSORS, STATE):
            fsync_path(work / name)
        (work / HASHES).write_text(canonical_json(hashes))
        fsync_path(work / HASHES)
        fsync_path(work)
        os.replace(work, self.directory / f"checkpoint-{state.step:08d}")
        fsync_path(self.directory)
        for old in self._found()[KEEP:]:
            shutil.rmtree(old)

    def restore(
        self,
        weights: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        course: Remembers,
    ) -> RunState | None:
        """Put the newest whole checkpoint back, or None where there is none."""
        if self._newest is None:
            return None
        path, record = self._newest
        say(f"going on from step {record['step']} ({path.name})")
        return _put_back(path, record, weights, optimizer, course)

    def _find_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint of this run. A damaged one is passed over, aloud."""
        self._clear_unfinished()
        for path in self._found():
            problem = _damage(path)
            if problem is not None:
                warn(f"{path} is damaged ({problem}); going back to the checkpoint before it")
                shutil.rmtree(path)
                continue
            record = json.loads((path / STATE).read_text())
            if record["identity"] == self.identity:
                return path, record
            warn(f"{path} is a checkpoint of another run (its spec or rows differ); removed")
            shutil.rmtree(path)
        return None

    def _found(self) -> list[Path]:
        """Finished checkpoints, newest first."""
        return sorted(self.directory.glob("checkpoint-*"), reverse=True)

    def _clear_unfinished(self) -> None:
        for path in self.directory.glob(".unfinished-*"):
            shutil.rmtree(path)


def _damage(path: Path) -> str | None:
    try:
        hashes = json.loads((path / HASHES).read_text())
        for name in (TENSORS, STATE):
            if sha256_file(path / name) != hashes[name]:
                return f"the hash of {name} differs"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _put_back(
    path: Path,
    record: dict[str, Any],
    weights: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    course: Remembers,
) -> RunState:
    # clone: what safetensors maps from the file must not be written to by training.
    tensors = {name: value.clone() for name, value in load_file(path / TENSORS).items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight/{name}"])
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, index, slot = name.split("/")
            slots.setdefault(int(index), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    prefix = "course/"
    course.restore(
        {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    )
    _restore_rng(tensors, record["rng"])
    curve = [CurvePoint.model_validate(point) for point in record["curve"]]
    return RunState(record["step"], record["tokens"], record["seconds"], curve)


def _torch_rng_states() -> dict[str, torch.Tensor]:
    states = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"rng/cuda{index}"] = state
    return states


def _host_rng_states() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _restore_rng(tensors: dict[str, torch.Tensor], host: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available():
        count = sum(name.startswith("rng/cuda") for name in tensors)
        torch.cuda.set_rng_state_all([tensors[f"rng/cuda{index}"] for index in range(count)])
    version, numbers, gauss = host["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = host["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
