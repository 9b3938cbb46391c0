"""A safetensors checkpoint as byte ranges: what is where, without reading a weight.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON (name: dtype, shape and
the tensor's range in the data), then the data: the tensors end to end, without holes.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from schemas.errors import UserError
from tasks.core.bases import require_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: The dtypes that an adapter can be folded into, by their names in the format.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FORMAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of a file. start, end: byte offsets in the file's data, header excluded."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def header_item(self) -> dict[str, Any]:
        offsets = [self.start, self.end]
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": offsets}


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint. data_start: byte offset of the data in the file."""

    path: Path
    tensors: tuple[TensorRecord, ...]
    metadata: dict[str, str]
    data_start: int

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header of a safetensors file.

        Raises:
            UserError: the file is cut short, or is not safetensors.
        """
        size = path.stat().st_size
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size - 8:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors = sorted(
                (
                    TensorRecord(name, item["dtype"], tuple(item["shape"]), *item["data_offsets"])
                    for name, item in header.items()
                ),
                key=lambda tensor: tensor.start,
            )
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise UserError.at(path, f"is no safetensors file: {error}", "fetch it again") from None
        end = tensors[-1].end if tensors else 0
        if size != 8 + length + end:
            raise UserError.at(
                path, f"has {size} bytes, its header says {8 + length + end}", "fetch it again"
            )
        return cls(path, tuple(tensors), metadata, 8 + length)


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a transformers directory: one file, or shards with an index."""

    directory: Path
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """The files that transformers itself would load from this directory.

        Raises:
            UserError: no safetensors weights, an index that names a missing file, a bad file.
        """
        require_safetensors(directory)
        if (directory / SINGLE).exists():
            return cls(directory, (Shard.open(directory / SINGLE),), None)
        if not (directory / INDEX).exists():
            raise UserError.at(
                directory,
                f"holds neither {SINGLE} nor {INDEX}",
                "give a transformers directory as `save_pretrained` writes it",
            )
        index = json.loads((directory / INDEX).read_text())
        names = sorted(set(index["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError.at(
                directory / INDEX, f"names {', '.join(missing)}, which is missing", "fetch it again"
            )
        return cls(directory, tuple(Shard.open(directory / name) for name in names), index)

    @cached_property
    def locations(self) -> dict[str, tuple[Shard, TensorRecord]]:
        """Tensor name: where it is."""
        return {tensor.name: (shard, tensor) for shard in self.shards for tensor in shard.tensors}

    def read(self, name: str) -> torch.Tensor:
        """One tensor in memory. Only for the few that are compared or moved, not for folding."""
        shard, record = self.locations[name]
        buffer = bytearray(record.nbytes)
        with shard.path.open("rb") as file:
            file.seek(shard.data_start + record.start)
            file.readinto(buffer)
        return torch.frombuffer(buffer, dtype=FLOATS[record.dtype]).reshape(record.shape)


def encode_header(tensors: list[TensorRecord], metadata: dict[str, str]) -> bytes:
    """Length and JSON as they stand at the start of a file, padded so that the data is aligned."""
    items: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    items.update({tensor.name: tensor.header_item() for tensor in tensors})
    text = json.dumps(items, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
