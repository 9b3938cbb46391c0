"""What the teacher wrote and thought, on disk: every epoch reads it, and the model runs once.

    scratch/states-<spec>/00007.safetensors     the texts of a few prompts, end to end
        states   [T, D]   what the lm_head read where each token was written, in the model's dtype
        tokens   int32 [T]     the token that was written there
        offsets  int64 [N + 1] text i is states[offsets[i]:offsets[i + 1]]
        written  sha256 of the tensors, and threads: with which they were computed (metadata)

A shard is written beside its place, synced and renamed, so that a killed stage goes on behind the
last; one that a disk has damaged since is told by its hash and written again. They are
memory-mapped: what is in memory is a step's rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tasks.core.files import canonical_json, fsync_path
from tasks.core.progress import warn

WRITTEN = "written"


@dataclass(frozen=True)
class Texts:
    """Some texts: states_TD, tokens_T and, for N texts, offsets [N + 1]."""

    states_TD: torch.Tensor
    tokens_T: torch.Tensor
    offsets: torch.Tensor


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.safetensors"


def save(texts: Texts, directory: Path, number: int) -> None:
    """Write one shard, whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob(".unfinished-*"):
        old.unlink()
    work = directory / f".unfinished-{os.getpid()}"
    tensors = {"states": texts.states_TD, "tokens": texts.tokens_T, "offsets": texts.offsets}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    written = {"sha256": digest(tensors), "threads": torch.get_num_threads()}
    # One entry: safetensors writes several in no fixed order.
    save_file(tensors, work, {WRITTEN: canonical_json(written)})
    fsync_path(work)
    os.replace(work, shard_path(directory, number))
    fsync_path(directory)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def is_whole(directory: Path, number: int) -> bool:
    """Whether a shard is there as it was written. One that is damaged is removed, aloud."""
    path = shard_path(directory, number)
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if digest(tensors) == written(file)["sha256"]:
                return True
            problem = "its hash differs"
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    warn(f"{path} is damaged ({problem}); its texts are written again")
    path.unlink()
    return False


def written(file: Any) -> dict[str, Any]:
    """What a shard says of itself."""
    found: dict[str, Any] = json.loads(file.metadata()[WRITTEN])
    return found


def begun_with(directory: Path) -> int | None:
    """Threads with which the first shard was computed, on which its sums depend."""
    try:
        with safe_open(shard_path(directory, 0), framework="pt") as file:
            return int(written(file)["threads"])
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return None


class States:
    """All shards of a directory, as one sequence of texts."""

    def __init__(self, directory: Path, shards: int) -> None:
        self.files = [
            safe_open(shard_path(directory, number), framework="pt") for number in range(shards)
        ]
        lengths: list[int] = []
        self.places: list[tuple[int, int]] = []  # of each text: its shard, its first token there
        for number, file in enumerate(self.files):
            offsets = file.get_tensor("offsets").tolist()  # type: ignore[no-untyped-call]
            self.places += [(number, start) for start in offsets[:-1]]
            lengths += [end - start for start, end in pairwise(offsets)]
        self.lengths: NDArray[np.int64] = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.places)

    def texts(self, chosen: NDArray[np.int64]) -> Texts:
        """Some of the texts, in that order."""
        states, tokens = [], []
        for index in chosen.tolist():
            shard, start = self.places[index]
            part = slice(start, start + int(self.lengths[index]))
            states.append(self.files[shard].get_slice("states")[part])
            tokens.append(self.files[shard].get_slice("tokens")[part])
        ends = np.cumsum([0, *self.lengths[chosen]])
        return Texts(torch.cat(states), torch.cat(tokens), torch.from_numpy(ends))


def shards_of(count: int, size: int) -> Iterator[tuple[int, slice]]:
    """Number and texts of each shard."""
    for number, start in enumerate(range(0, count, size)):
        yield number, slice(start, min(start + size, count))
