"""Writing the merged checkpoint: pieces of files, read, folded and written by a few threads.

Every output offset is known from the plan, so pieces are independent. What a thread holds is
one piece of a weight and its float32 copy, whatever the size of a shard or of a tensor. Each
piece is handed to the disk as soon as it is written, so that the final sync finds little to do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import RetryableError, StageError
from tasks.core.progress import bar
from tasks.merge.checkpoint import FLOATS, encode_header
from tasks.merge.plan import Copy, Fold, New, OutShard, Plan

#: Elements of one folded piece: its float32 copy, 2 MiB, stays in a core's cache.
PIECE_ELEMENTS = 1 << 19
COPY_BYTES = 8 << 20
THREADS = 4


@dataclass(frozen=True)
class Piece:
    """`size` bytes from `offset` of an open output file, made from `origin` starting at `start`.

    start: byte offset in the source file (Copy), first row (Fold), or byte of the value (New).
    """

    target: int
    offset: int
    size: int
    origin: Copy | Fold | New
    start: int


def write_checkpoint(plan: Plan, directory: Path) -> None:
    """Write and sync every shard of the plan. Raises OSError where the disk is full."""
    total = sum(tensor.record.nbytes for tensor in plan.tensors())
    with ExitStack() as stack, bar("merge", total, "bytes") as progress:
        files = SourceFiles(stack)
        pieces: list[Piece] = []
        targets: list[int] = []
        for shard in plan.shards:
            target = os.open(directory / shard.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            stack.callback(os.close, target)
            targets.append(target)
            pieces += pieces_of(shard, target)
        workers = min(THREADS, len(os.sched_getaffinity(0)))
        with single_threaded_torch(), ThreadPoolExecutor(workers) as pool:
            for size in pool.map(lambda piece: write_piece(piece, files), pieces):
                progress.advance(size)
            list(pool.map(os.fsync, targets))


def pieces_of(shard: OutShard, target: int) -> Iterator[Piece]:
    """The work of one file, in the order of its bytes; neighbouring copies are one piece."""
    header = encode_header([tensor.record for tensor in shard.tensors], shard.metadata)
    size = len(header) + (shard.tensors[-1].record.end if shard.tensors else 0)
    os.posix_fallocate(target, 0, size)
    write_all(target, memoryview(header), 0)
    for tensor in shard.tensors:
        origin, offset = tensor.origin, len(header) + tensor.record.start
        if isinstance(origin, Fold):
            rows, columns = tensor.record.shape
            step = max(1, PIECE_ELEMENTS // columns)
            row_bytes = tensor.record.nbytes // rows
            for row in range(0, rows, step):
                count = min(step, rows - row)
                yield Piece(target, offset + row * row_bytes, count * row_bytes, origin, row)
        else:
            start = 0
            if isinstance(origin, Copy):
                start = origin.shard.data_start + origin.tensor.start
            for at in range(0, tensor.record.nbytes, COPY_BYTES):
                part = min(COPY_BYTES, tensor.record.nbytes - at)
                yield Piece(target, offset + at, part, origin, start + at)


class SourceFiles:
    """The base's shards, each opened once, closed with `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
                self._stack.callback(os.close, self._open[path])
            return self._open[path]


class Buffers(threading.local):
    """One thread's memory for one piece, kept between pieces: fresh pages cost more than sums."""

    def __init__(self) -> None:
        self.raw = torch.empty(0, dtype=torch.uint8)
        self.sum = torch.empty(0, dtype=torch.float32)

    def take(self, size: int, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.raw.numel() < size:
            self.raw = torch.empty(size, dtype=torch.uint8)
        if self.sum.numel() < elements:
            self.sum = torch.empty(elements, dtype=torch.float32)
        return self.raw[:size], self.sum[:elements]


BUFFERS = Buffers()


def write_piece(piece: Piece, files: SourceFiles) -> int:
    """Make one piece and start its way to the disk. Returns its size in bytes."""
    origin = piece.origin
    if isinstance(origin, Copy):
        copy_bytes(files.descriptor(origin.shard.path), piece)
    elif isinstance(origin, Fold):
        fold_rows(files.descriptor(origin.shard.path), piece, origin)
    else:
        value = byte_view(origin.value)
        write_all(piece.target, value[piece.start : piece.start + piece.size], piece.offset)
    # Starts the write-back of these pages now. They stay cached: dirty pages are not dropped.
    os.posix_fadvise(piece.target, piece.offset, piece.size, os.POSIX_FADV_DONTNEED)
    return piece.size


def fold_rows(source: int, piece: Piece, fold: Fold) -> None:
    """Rows of a folded W: read, summed in float32, rounded once to W's dtype, written."""
    dtype, columns = FLOATS[fold.tensor.dtype], fold.tensor.shape[1]
    rows = piece.size // (columns * dtype.itemsize)
    raw, flat = BUFFERS.take(piece.size, rows * columns)
    weights = raw.view(dtype).view(rows, columns)
    at = fold.shard.data_start + fold.tensor.start + piece.start * columns * dtype.itemsize
    read_all(source, byte_view(raw), at)
    if dtype == torch.float64:
        fold_into(weights, fold, piece.start)
    else:
        total = flat.view(rows, columns)
        total.copy_(weights)
        fold_into(total, fold, piece.start)
        weights.copy_(total)
    if dtype == torch.float16 and not weights.isfinite().all():
        raise StageError(
            f"{fold.tensor.name}: a merged weight is beyond float16 (65,504), which loses the "
            "model; set `finish: {merge: false}`, or use a base in bfloat16"
        )
    write_all(piece.target, byte_view(raw), piece.offset)


def fold_into(weights: torch.Tensor, fold: Fold, start: int) -> None:
    """W + left @ right, or W * scale, of the rows from `start` on, in place; a piece has whole
    rows, so that their lengths are known."""
    part, dtype = slice(start, start + len(weights)), weights.dtype
    if fold.scale is not None:
        weights.mul_((fold.scale if len(fold.scale) == 1 else fold.scale[part]).to(dtype))
    if fold.left is not None and fold.right is not None:
        weights.addmm_(fold.left[part].to(dtype), fold.right.to(dtype))
    if fold.lengths is not None:
        now = torch.linalg.vector_norm(weights, dim=1)
        weights.mul_((fold.lengths[part].to(dtype) / now)[:, None])


def copy_bytes(source: int, piece: Piece) -> None:
    """Bytes from file to file inside the kernel, where it can; through memory elsewhere."""
    done = 0
    while done < piece.size:
        try:
            count = os.copy_file_range(
                source, piece.target, piece.size - done, piece.start + done, piece.offset + done
            )
        except OSError:
            count = 0
        if count == 0:
            raw, _ = BUFFERS.take(piece.size - done, 0)
            read_all(source, byte_view(raw), piece.start + done)
            write_all(piece.target, byte_view(raw), piece.offset + done)
            return
        done += count


def byte_view(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_all(source: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(source, [into[done:]], offset + done)
        if count == 0:
            raise RetryableError("the base's weights were cut short while they were read")
        done += count


def write_all(target: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], offset + done)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """The threads are ours; torch's own beside them would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
