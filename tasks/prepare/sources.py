"""Where rows come from: JSONL and CSV as they are; Parquet and hub data sets as JSONL first.

A row of a Parquet file or a hub data set has no text of its own, so it gets one: a JSON line in
the scratch directory. From there on there are only lines, and the quarantine quotes lines.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.recipe import Source
from tasks.core.pictures import BASE64
from tasks.prepare.blocks import LINE_LIMIT, plan_json_lines
from tasks.prepare.csv_rows import delimiter_of, read_header

HUB = "hub:"
JSON_LINES = (".jsonl", ".ndjson")
CSV = (".csv", ".tsv")
PARQUET = (".parquet", ".pq")

#: Lines of the file's start that are looked at to find its column names.
PEEK_LINES = 1000

#: What the quarantine shows of a line above the limit.
SHOWN_BYTES = 1024


@dataclass(frozen=True)
class Readable:
    """A source made ready: name is what a person knows it by, path the lines to read.

    root: the directory of the user's own lines, which paths within them are relative to.
    """

    name: str
    path: Path
    format: Literal["jsonl", "csv"]
    columns: list[str]
    root: Path | None = None


def open_source(source: Source, path: Path | None, scratch: Path) -> Readable:
    """Make a source ready to be read line by line, and find the names of its columns.

    Raises:
        UserError: it is not there, empty, or of a format that is not read.
    """
    name = source.path
    if name.startswith(HUB):
        lines = scratch / "hub.jsonl"
        write_lines(hub_batches(source), lines)
        return Readable(name, lines, "jsonl", json_columns(lines))
    assert path is not None, f"no path for {name}"
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise UserError.at(name, found, "give a JSONL, CSV or Parquet file, or hub:NAME")
    if path.stat().st_size == 0:
        raise UserError.at(name, "is empty", "give a file with at least one row")
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return Readable(name, path, "jsonl", json_columns(path), path.parent)
    if suffix in CSV:
        return Readable(name, path, "csv", csv_columns(path, name), path.parent)
    if suffix in PARQUET:
        lines = scratch / "parquet.jsonl"
        write_lines(parquet_batches(path, name), lines)
        return Readable(name, lines, "jsonl", json_columns(lines))
    raise UserError.at(
        name,
        f"files named *{suffix or ' without a suffix'} are not read",
        f"use one of {', '.join(JSON_LINES + CSV + PARQUET)} (JSON: one object a line)",
    )


def json_columns(path: Path) -> list[str]:
    """The keys of the first objects of a JSONL file, in the order of their appearance."""
    names: dict[str, None] = {}
    for block in plan_json_lines(path):
        with path.open("rb") as file:
            file.seek(block.start)
            content = file.read(min(block.end - block.start, LINE_LIMIT))
        for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:PEEK_LINES]:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(record, dict):
                names.update(dict.fromkeys(record))
        if names:
            break
    return list(names)


def csv_columns(path: Path, name: str) -> list[str]:
    header = read_header(path, name)
    if len(header) == 1 and delimiter_of(path) == ",":
        for other, word in ((";", "semicolons"), ("\t", "tabs")):
            if other in header[0]:
                raise UserError.at(
                    f"{name}:1",
                    f"one column, {header[0]!r}: the fields are separated by {word}",
                    "separate them by commas, or name a file with tabs *.tsv",
                )
    return header


def parquet_batches(path: Path, name: str) -> Iterator[pa.RecordBatch]:
    try:
        file = pq.ParquetFile(path)
        yield from file.iter_batches(batch_size=10_000)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError.at(
            name, f"is no whole Parquet file: {error}", "write it again, or give JSONL or CSV"
        ) from error


def hub_batches(source: Source) -> Iterator[pa.RecordBatch]:
    """The rows of a `datasets` hub id, class labels as their names."""
    import datasets

    name = source.path.removeprefix(HUB)
    place = Path(name)
    if place.exists():
        repository, config = name, None
    else:
        parts = name.split("/")
        repository, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
        if source.revision is None:
            raise UserError.at(
                source.path,
                "a hub data set without a revision changes under the recipe",
                "add `revision: <commit>` beside its path",
            )
    try:
        rows = datasets.load_dataset(
            repository, config, revision=source.revision, split=source.split or "train"
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError.at(
            source.path,
            f"cannot be loaded: {error}",
            "check id, config, split and revision; without a network, give a file instead",
        ) from error
    labels = {
        column: feature
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for batch in rows.with_format("arrow").iter(batch_size=10_000):
        for column, feature in labels.items():
            index = batch.schema.get_field_index(column)
            names = [
                None if value is None or value < 0 else feature.int2str(value)
                for value in batch[column].to_pylist()
            ]
            batch = batch.set_column(index, column, pa.array(names, pa.string()))
        yield from batch.to_batches()


def write_lines(batches: Iterator[pa.RecordBatch], path: Path) -> None:
    """Rows as JSON lines; what JSON has no form for (dates, bytes) as its text."""
    with path.open("wb") as file:
        for batch in batches:
            for record in batch.to_pylist():
                file.write(orjson.dumps(record, default=as_text, option=orjson.OPT_APPEND_NEWLINE))


def as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return BASE64 + base64.b64encode(value).decode()
    return str(value)


def recall(path: Path, offset: int, length: int) -> str:
    """The raw text of a line, for the quarantine.

    Bytes that are not UTF-8 come as `base64:…`, which loses nothing. A line above the limit
    comes as its first KiB with its length and hash.
    """
    with path.open("rb") as file:
        file.seek(offset)
        if length <= LINE_LIMIT:
            raw = file.read(length)
            try:
                return raw.decode()
            except UnicodeDecodeError:
                return BASE64 + base64.b64encode(raw).decode()
        shown = file.read(SHOWN_BYTES)
        digest = hashlib.sha256(shown)
        left = length - len(shown)
        while left:
            chunk = file.read(min(left, 1 << 20))
            digest.update(chunk)
            left -= len(chunk)
    start = shown.decode(errors="backslashreplace")
    return f"{start}… [{length} bytes, sha256 {digest.hexdigest()}]"
