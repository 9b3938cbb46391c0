"""The image files that the rows of a data file name, so that a changed image is another input.

Read before anything heavy is imported: what this misses no stage can make up for, so it reads a
file as `prepare` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.core.pictures import BASE64


def named_images(path: Path, column: str) -> list[str]:
    """The paths in a column of a JSONL or CSV file, each once, as they are written. A Parquet file
    holds its images itself."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        values = _of_json_lines(path, column)
    elif path.suffix.lower() in (".csv", ".tsv"):
        values = _of_csv(path, column)
    else:
        return []
    paths = (value for value in values if isinstance(value, str) and not value.startswith(BASE64))
    # A path with a NUL names no file, and cannot be asked for.
    return list(dict.fromkeys(name for name in paths if "\0" not in name))


def _of_json_lines(path: Path, column: str) -> Iterator[Any]:
    import orjson

    with path.open("rb") as file:
        for line in file:
            try:
                record = orjson.loads(line.removeprefix(b"\xef\xbb\xbf"))
            except orjson.JSONDecodeError:
                continue  # prepare refuses it
            if isinstance(record, dict):
                value = record.get(column)
                yield value.get("bytes") if isinstance(value, dict) else value


def _of_csv(path: Path, column: str) -> Iterator[str]:
    from tasks.prepare.csv_rows import Records, delimiter_of

    place: int | None = None
    with path.open("rb") as file:
        for number, record in enumerate(Records(file, delimiter_of(path))):
            if number == 0:
                names = [name.strip() for name in record.fields or []]
                if column not in names:
                    return
                place = names.index(column)
            elif record.fields is not None and place is not None and place < len(record.fields):
                yield record.fields[place]
