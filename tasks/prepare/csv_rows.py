"""CSV and TSV: records that may span lines, each with its first line and its bytes in the file.

Python's own reader decides where a record ends; it is fed line by line so that the bytes of each
record are known. A quote that never closes would swallow the rest of the file: its record is cut
off, its first line is refused, and reading starts again at the next line.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from schemas.errors import UserError
from tasks.prepare.blocks import LINE_LIMIT, Block, Layout, Sorter

#: Lines that one quoted record may span before its quote counts as never closed.
RECORD_LINES = 1000

#: Records that are held against their contract at a time.
BLOCK_RECORDS = 20_000


@dataclass(frozen=True)
class CsvRecord:
    """fields, or the reason why there are none; line counts from 1."""

    line: int
    offset: int
    length: int
    fields: list[str] | None
    reason: str | None = None


@dataclass(frozen=True)
class Line:
    """A physical line; text is None where it is too long or not UTF-8 (`reason` says which)."""

    number: int
    offset: int
    length: int
    text: str | None
    reason: str | None = None


class _Cut(Exception):
    """A record that spans more lines or bytes than a record may."""


def lines_of(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file, never holding more than LINE_LIMIT bytes of one."""
    number, offset = 0, 0
    while raw := file.readline(LINE_LIMIT + 1):
        number += 1
        size = len(raw)
        if size > LINE_LIMIT and not raw.endswith(b"\n"):
            last = raw
            while not last.endswith(b"\n") and (last := file.readline(LINE_LIMIT)):
                size += len(last)
            length = size - last.endswith(b"\n")
            yield Line(number, offset, length, None, f"oversized_line:{length}")
        else:
            length = size - raw.endswith(b"\n")
            body = raw.removeprefix(b"\xef\xbb\xbf") if offset == 0 else raw
            try:
                yield Line(number, offset, length, body.decode())
            except UnicodeDecodeError:
                yield Line(number, offset, length, None, "bad_utf8")
        offset += size


class Records:
    """Iterates the records of an open CSV file, the header among them."""

    def __init__(self, file: BinaryIO, delimiter: str) -> None:
        self._source = lines_of(file)
        self._again: deque[Line] = deque()
        self._taken: list[Line] = []
        self._delimiter = delimiter

    def _feed(self) -> Iterator[str]:
        """Lines of text for csv.reader; stops before a line that is none."""
        while True:
            line = self._again.popleft() if self._again else next(self._source, None)
            if line is None:
                return
            if line.text is None:
                self._again.appendleft(line)
                return
            held = line.offset - self._taken[0].offset if self._taken else 0
            if len(self._taken) >= RECORD_LINES or held > LINE_LIMIT:
                self._again.appendleft(line)
                raise _Cut
            self._taken.append(line)
            yield line.text

    def __iter__(self) -> Iterator[CsvRecord]:
        limit = csv.field_size_limit(LINE_LIMIT)
        try:
            yield from self._records()
        finally:
            csv.field_size_limit(limit)

    def _records(self) -> Iterator[CsvRecord]:
        while True:
            reader = csv.reader(self._feed(), delimiter=self._delimiter, strict=True)
            try:
                for fields in reader:
                    yield self._record(fields)
            except (csv.Error, _Cut):
                yield self._refuse_first()
                continue
            # The feed stopped: at the end of the file, or at a line that is no text.
            line = self._again.popleft() if self._again else next(self._source, None)
            if line is None:
                return
            if line.text is None:
                yield CsvRecord(line.number, line.offset, line.length, None, line.reason)
            else:
                self._again.appendleft(line)

    def _record(self, fields: list[str]) -> CsvRecord:
        first, last = self._taken[0], self._taken[-1]
        self._taken = []
        length = last.offset + last.length - first.offset
        reason = None if fields else "blank_line"
        return CsvRecord(first.number, first.offset, length, fields or None, reason)

    def _refuse_first(self) -> CsvRecord:
        first, *rest = self._taken
        self._taken = []
        self._again.extendleft(reversed(rest))
        return CsvRecord(first.number, first.offset, first.length, None, "malformed_csv")


def delimiter_of(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def read_header(path: Path, name: str) -> list[str]:
    """The column names of a CSV file, without white space around them."""
    with path.open("rb") as file:
        record = next(iter(Records(file, delimiter_of(path))), None)
    if record is None or record.fields is None:
        reason = record.reason if record else "no line"
        raise UserError.at(
            f"{name}:1",
            f"no header can be read ({reason})",
            "start the file with one line of column names, in UTF-8",
        )
    return [column.strip() for column in record.fields]


def sort_csv(path: Path, layout: Layout, scratch: Path) -> Iterator[Block]:
    """Sort the records of a CSV file, block by block, in this process.

    A block's n_lines counts physical lines up to the next block, so that lines add up.
    """
    header: list[str] | None = None
    first_line, held = 1, 0
    sorter, number = Sorter(layout), 0
    next_line = 1
    with path.open("rb") as file:
        for record in Records(file, delimiter_of(path)):
            if header is None:
                assert record.fields is not None, "read_header has seen the header"
                header = [column.strip() for column in record.fields]
                continue
            line = record.line - first_line + 1
            place = (line, record.offset, record.length)
            if record.fields is None:
                assert record.reason is not None
                sorter.refuse(*place, record.reason)
            elif len(record.fields) != len(header):
                sorter.refuse(*place, f"wrong_field_count:{len(record.fields)}")
            else:
                sorter.add(*place, dict(zip(header, record.fields, strict=True)))
            held, next_line = held + 1, record.line
            if held >= BLOCK_RECORDS:
                yield sorter.finish(next_line - first_line + 1, scratch / f"{number}.arrow")
                sorter, number, held, first_line = Sorter(layout), number + 1, 0, next_line + 1
    yield sorter.finish(next_line - first_line + 1, scratch / f"{number}.arrow")
