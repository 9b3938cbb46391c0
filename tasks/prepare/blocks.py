"""A block of a source file: its lines sorted into typed rows and refused lines.

The same code runs in this process for a small file and in worker processes for a large one, so
it imports little. A block's rows go to an Arrow file; what comes back is small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from schemas.rows import Kind, failures
from tasks.prepare.records import (
    DIGEST_BYTES,
    Record,
    Refusal,
    Row,
    digest_of,
    row_reader,
    to_table,
)

#: The longest line that is read as a row. A longer one is refused without being held in memory.
LINE_LIMIT = 16 << 20

#: Bytes that are parsed at a time: memory of a worker against the cost of a block.
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class Layout:
    """What the rows of a split are: their kind, and the file's name of each of our columns.

    root: where the paths of images begin; None where a source has no place of its own.
    """

    kind: Kind
    sources: dict[str, str]
    root: Path | None = None


@dataclass(frozen=True)
class Refused:
    """A line that is no row. offset and length: its bytes in the source, without the newline."""

    line: int
    offset: int
    length: int
    reasons: list[str]


@dataclass(frozen=True)
class Block:
    """The sorted lines of a block; lines count from `first line of the block` + 1.

    lines, offsets, lengths: of the rows, [N]; digests: [N, 2] of 64 bits; table: the Arrow file.
    """

    n_lines: int
    lines: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint64]
    refused: list[Refused]
    table: Path


@dataclass
class Sorter:
    """Collects the records of a block; `finish` holds the rows against their contract."""

    layout: Layout
    refused: list[Refused] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._read = row_reader(self.layout.kind, self.layout.sources, self.layout.root)
        self._rows: list[Row] = []
        self._places: list[tuple[int, int, int]] = []
        self._digests: list[bytes] = []

    def add(self, line: int, offset: int, length: int, record: Record) -> None:
        try:
            row = self._read(record)
            digest = digest_of(self.layout.kind, row)
        except Refusal as refusal:
            self.refuse(line, offset, length, *refusal.args)
            return
        self._rows.append(row)
        self._places.append((line, offset, length))
        self._digests.append(digest)

    def refuse(self, line: int, offset: int, length: int, *reasons: str) -> None:
        self.refused.append(Refused(line, offset, length, list(reasons)))

    def finish(self, n_lines: int, path: Path) -> Block:
        """Validate, write the rows that keep their contract to `path`, and say where all went."""
        places = np.array(self._places, np.int64).reshape(-1, 3)
        digests = np.frombuffer(b"".join(self._digests), np.uint64)
        digests = digests.reshape(-1, DIGEST_BYTES // 8)
        table = to_table(self.layout.kind, places[:, 0].tolist(), self._rows)
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        broken = failures(self.layout.kind, frame)
        for index, reasons in broken.items():
            line, offset, length = places[index].tolist()
            self.refuse(line, offset, length, *reasons)
        if broken:
            whole = np.ones(len(places), bool)
            whole[list(broken)] = False
            places, digests, table = places[whole], digests[whole], table.filter(pa.array(whole))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        self.refused.sort(key=lambda refused: refused.line)
        return Block(n_lines, places[:, 0], places[:, 1], places[:, 2], digests, self.refused, path)


@dataclass(frozen=True)
class JsonLines:
    """Whole lines of a JSONL file, bytes [start, end).

    A block above BLOCK_BYTES is a single line; newline says whether one ends it.
    """

    path: Path
    start: int
    end: int
    newline: bool = True


def sort_json_lines(job: JsonLines, layout: Layout, table: Path) -> Block:
    """Sort the lines of one block of a JSONL file."""
    sorter = Sorter(layout)
    if job.end - job.start > BLOCK_BYTES + LINE_LIMIT:
        length = job.end - job.start - job.newline
        sorter.refuse(1, job.start, length, f"oversized_line:{length}")
        return sorter.finish(1, table)
    with job.path.open("rb") as file:
        file.seek(job.start)
        content = file.read(job.end - job.start)
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    offset = job.start
    for number, line in enumerate(lines, start=1):
        length = len(line)
        try:
            if length > LINE_LIMIT:
                sorter.refuse(number, offset, length, f"oversized_line:{length}")
            else:
                # A byte order mark at the start of the file is no part of the first line's JSON.
                text = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
                record = orjson.loads(text)
                if type(record) is dict:
                    sorter.add(number, offset, length, record)
                else:
                    sorter.refuse(number, offset, length, "not_an_object")
        except orjson.JSONDecodeError:
            sorter.refuse(number, offset, length, unreadable(line))
        offset += length + 1
    return sorter.finish(len(lines), table)


def unreadable(line: bytes) -> str:
    """Why a line is no JSON, as a reason code."""
    if not line.strip():
        return "blank_line"
    try:
        line.decode()
    except UnicodeDecodeError:
        return "bad_utf8"
    return "malformed_json"


def plan_json_lines(path: Path) -> list[JsonLines]:
    """Cut a JSONL file at newlines into blocks; a line over the limit is a block of its own."""
    size = path.stat().st_size
    blocks: list[JsonLines] = []
    with path.open("rb") as file:
        start = 0
        while start < size:
            if start + BLOCK_BYTES >= size:
                blocks.append(JsonLines(path, start, size))
                break
            file.seek(start)
            head = file.read(BLOCK_BYTES)
            cut = head.rfind(b"\n")
            if cut >= 0:
                end, newline = start + cut + 1, True
            else:
                end, newline = next_newline(path, start + BLOCK_BYTES, size)
            blocks.append(JsonLines(path, start, end, newline))
            start = end
    return blocks


def next_newline(path: Path, position: int, size: int) -> tuple[int, bool]:
    """The position after the first newline from `position` on, or (end of the file, False)."""
    with path.open("rb") as file:
        file.seek(position)
        while chunk := file.read(1 << 20):
            found = chunk.find(b"\n")
            if found >= 0:
                return position + found + 1, True
            position += len(chunk)
    return size, False
