"""One record of a file (a dict) becomes a typed row and its digest, or reasons to refuse it.

What needs a value's Python type is decided here; what can be said of typed columns stands in the
contracts of `schemas/rows.py`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from schemas.rows import COLUMNS, Kind
from tasks.core.pictures import BadPicture, content_digest, decode, encoded

#: Bytes of a row's digest: 128 bits, so that two of a billion rows meet with odds of 1e-21.
DIGEST_BYTES = 16

#: Between the parts of a row. No part of a row that is kept holds a NUL.
SEPARATOR = " \0 "

#: A place in a text beyond every text, and within 64 bits.
FARTHEST = 1 << 40

SPANS = pa.large_list(
    pa.struct({"start": pa.int64(), "end": pa.int64(), "label": pa.large_string()})
)
SPAN_KEYS = ("start", "end", "label")

Record = dict[str, Any]
Row = tuple[Any, ...]
Span = tuple[int, int, str]


class Refusal(Exception):
    """A record that is no row. args: reason codes."""


def normalise(text: str) -> str:
    """Text as two rows are compared: NFC, every run of white space one space, none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def digest(parts: list[str]) -> bytes:
    """128 bits that are the same for rows whose parts are equal after normalisation."""
    text = normalise(SEPARATOR.join(parts))
    return blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def text_of(record: Record, name: str, source: str) -> str:
    """A column that holds text."""
    value = record.get(source)
    if type(value) is str:
        return value
    raise Refusal(f"missing:{name}" if value is None else f"wrong_type:{name}")


def label_of(record: Record, name: str, source: str) -> str:
    """A label: text, or an integer or boolean as its text. White space around it is no part."""
    value = record.get(source)
    if type(value) is str:
        return value.strip()
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int:
        return str(value)
    raise Refusal(f"missing:{name}" if value is None else f"wrong_type:{name}")


def messages_of(record: Record, name: str, source: str) -> list[str]:
    """A conversation as role, content, role, content, …"""
    value = record.get(source)
    if type(value) is not list:
        raise Refusal(f"missing:{name}" if value is None else f"wrong_type:{name}")
    flat: list[str] = []
    for message in value:
        if type(message) is not dict:
            raise Refusal(f"wrong_type:{name}")
        role: Any = message.get("role")
        content: Any = message.get("content")
        if type(role) is not str or type(content) is not str or len(message) != 2:
            check_message(message, name)
        flat.append(role)
        flat.append(content)
    return flat


def check_message(message: Record, name: str) -> None:
    """Raise a Refusal for a message that is more or less than a role and a content."""
    for key in ("role", "content"):
        if message.get(key) is None:
            raise Refusal(f"missing:{name}.{key}")
        if type(message[key]) is not str:
            raise Refusal(f"wrong_type:{name}.{key}")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value]
    if extra:
        raise Refusal(*(f"extra_key:{name}.{key}" for key in extra))


def spans_of(record: Record, name: str, source: str) -> list[Span]:
    """Spans by their start, each as (start, end, label)."""
    value = record.get(source)
    if type(value) is not list:
        raise Refusal(f"missing:{name}" if value is None else f"wrong_type:{name}")
    found = []
    for span in value:
        if type(span) is not dict:
            raise Refusal(f"wrong_type:{name}")
        for key in ("start", "end"):
            if type(span.get(key)) is not int:
                fault = "missing" if span.get(key) is None else "wrong_type"
                raise Refusal(f"{fault}:{name}.{key}")
            if abs(span[key]) > FARTHEST:
                raise Refusal("span_out_of_range")
        extra = [key for key, given in span.items() if key not in SPAN_KEYS and given is not None]
        if extra:
            raise Refusal(*(f"extra_key:{name}.{key}" for key in extra))
        found.append((span["start"], span["end"], label_of(span, f"{name}.label", "label")))
    return sorted(found)


class Picture(NamedTuple):
    """A column that holds an image. reference: see `tasks.core.pictures.encoded`."""

    reference: str
    digest: bytes


def image_of(root: Path | None, record: Record, name: str, source: str) -> Picture:
    """A column that holds an image: a path relative to `root`, or its bytes in base64, alone or as
    `datasets` writes an image ({bytes, path}; of a Parquet file bytes are base64 by now)."""
    value = record.get(source)
    if type(value) is dict:
        name, value = f"{name}.bytes", value.get("bytes")
    if type(value) is not str:
        raise Refusal(f"missing:{name}" if value is None else f"wrong_type:{name}")
    try:
        return Picture(value, content_digest(decode(encoded(value, root)), DIGEST_BYTES))
    except BadPicture as bad:
        raise Refusal(*bad.args) from None


#: Column: how its value is read.
READERS: dict[str, Callable[[Record, str, str], Any]] = {
    "messages": messages_of,
    "prompt": text_of,
    "completion": text_of,
    "text": text_of,
    "label": label_of,
    "spans": spans_of,
}


def row_reader(
    kind: Kind, sources: dict[str, str], root: Path | None = None
) -> Callable[[Record], Row]:
    """A function from a record to the values of its columns; it raises Refusal.

    sources: our column name: the file's. root: where the paths of images begin.
    """
    readers = READERS | {"image": partial(image_of, root)}
    columns = [(readers[name], name, sources[name]) for name in COLUMNS[kind]]
    if len(columns) == 1:
        [(read, name, source)] = columns
        return lambda record: (read(record, name, source),)

    def read_all(record: Record) -> Row:
        values: list[Any] = []
        reasons: list[str] = []
        for read, name, source in columns:
            try:
                values.append(read(record, name, source))
            except Refusal as refusal:
                reasons.extend(refusal.args)
        if reasons:
            raise Refusal(*reasons)
        return tuple(values)

    return read_all


def digest_of(kind: Kind, row: Row) -> bytes:
    """The digest of a row, over all of its values.

    A prompt and its completion are the chat of one question, and equal to it. An image is itself
    whatever its label: seen in training, it would be remembered in the test under any.
    """
    if kind == "image":
        picture: Picture = row[0]
        return picture.digest
    if kind == "chat":
        return digest(row[0])
    if kind == "completion":
        return digest(["user", row[0], "assistant", row[1]])
    if kind == "spans":
        return digest([row[0], *span_parts(*row)])
    return digest(list(row))


def span_parts(text: str, spans: list[Span]) -> Iterator[str]:
    """Spans as they are compared: by their places in the normalised text."""
    for start, end, label in spans:
        places = (len(normalise(text[: max(0, place)])) for place in (start, end))
        yield " ".join([*map(str, places), label])


def to_table(kind: Kind, lines: list[int], rows: list[Row]) -> pa.Table:
    """Rows as an Arrow table with the columns of their contract."""
    columns: dict[str, pa.Array] = {"row": pa.array(lines, pa.int64())}
    if kind == "chat":
        flat = [part for (messages,) in rows for part in messages]
        fields = [pa.array(flat[0::2], pa.large_string()), pa.array(flat[1::2], pa.large_string())]
        ends = list(accumulate((len(messages) // 2 for (messages,) in rows), initial=0))
        structs = pa.StructArray.from_arrays(fields, ["role", "content"])
        columns["messages"] = pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), structs)
    elif kind == "image":
        columns["image"] = pa.array([picture.reference for picture, _ in rows], pa.large_string())
        columns["label"] = pa.array([label for _, label in rows], pa.large_string())
    elif kind == "spans":
        columns["text"] = pa.array([text for text, _ in rows], pa.large_string())
        dicts = [[dict(zip(SPAN_KEYS, span, strict=True)) for span in row] for _, row in rows]
        columns["spans"] = pa.array(dicts, SPANS)
    else:
        for index, name in enumerate(COLUMNS[kind]):
            columns[name] = pa.array([row[index] for row in rows], pa.large_string())
    return pa.table(columns)
