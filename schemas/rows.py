"""The row contracts: what a row of each kind must be before anything learns from it.

The name of a check is the reason code under which a failing row stands in the quarantine, so
that the contract and the report cannot drift apart. Frames are collected before validation: a
LazyFrame gets schema checks only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pandera.polars as pa
import polars as pl
from pandera.polars import PolarsData

Kind = Literal["chat", "completion", "label", "spans", "text", "image"]

ROLES = ("system", "user", "assistant", "tool")

#: The columns of each kind, in the words of the recipe's `columns`.
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "spans": ("text", "spans"),
    "text": ("text",),
    "image": ("image", "label"),
}

#: Kinds whose rows are a text, which no template writes.
TEXTS: tuple[Kind, ...] = ("label", "spans", "text")
#: Kinds that a head of classes learns from.
LABELLED: tuple[Kind, ...] = ("label", "spans", "image")

#: Reason code (what stands before a colon in the quarantine): what it means.
REASONS: dict[str, str] = {
    "blank_line": "a line with nothing on it",
    "oversized_line": "a line above 16 MiB; its length follows",
    "bad_utf8": "bytes that are not UTF-8; raw is base64",
    "malformed_json": "not JSON",
    "not_an_object": "JSON, but not an object",
    "malformed_csv": "quoting that does not close",
    "wrong_field_count": "more or fewer fields than the header; the count follows",
    "missing": "a column without a value",
    "wrong_type": "a column with a value of another type",
    "extra_key": "a message or span with a key that would be lost, such as tool_calls",
    "nul_byte": "text with a NUL character",
    "unknown_role": f"a message whose role is none of {', '.join(ROLES)}",
    "no_answer": "a chat that does not end with the assistant's answer",
    "empty_prompt": "nothing before the answer",
    "empty_answer": "an answer or label with nothing in it",
    "empty_text": "a text with nothing in it",
    "unknown_label": "a held-out row with a label that no train row has",
    "span_out_of_range": "a span that is empty or reaches out of its text",
    "overlapping_spans": "two spans that share a character",
    "span_off_tokens": "a span that begins or ends in a token or in white space; its place follows",
    "no_file": "no image file at that path beside the data file (a Parquet file holds the bytes)",
    "not_an_image": "bytes of no image format that is read",
    "broken_image": "an image that is cut short or damaged",
    "empty_image": "an image with no bytes or no pixels",
    "image_mode": "pixels that 8-bit RGB would change; their mode in Pillow follows",
    "several_frames": "an animation or several pages; their number follows",
    "image_too_large": "an image above 89 million pixels",
    "duplicate_of": "equal, after normalisation (an image: pixel for pixel, whatever its label), "
    "to the row at the line that follows",
    "leaks_into_test": "a train row equal, in that way, to the test row at the line that follows",
    "template_refused": "the model's chat template raised an error",
    "control_token": "text that spells one of the tokenizer's special tokens",
    "too_long": "more tokens than max_length (seq2seq: of one side); the count follows",
    "no_answer_token": "no token of the answer (of spans: of the text) is left to learn",
    "not_sampled": "a good test row that `test_rows` left out",
}


def _check(name: str, holds: Callable[[str], pl.Expr]) -> pa.Check:
    """A check of one column; `holds` makes the condition from the column's name."""

    def select(data: PolarsData) -> pl.LazyFrame:
        rows: pl.LazyFrame = data.lazyframe
        return rows.select(holds(data.key))

    return pa.Check(select, name=name)


def _every(name: str, condition: pl.Expr) -> pa.Check:
    """A check of a list column: the condition holds for each of its elements."""
    return _check(name, lambda key: pl.col(key).list.eval(condition).list.all())


def _blank(text: pl.Expr) -> pl.Expr:
    return text.str.strip_chars().str.len_bytes() == 0


def _nul(text: pl.Expr) -> pl.Expr:
    return text.str.contains("\0", literal=True)


def _role(message: pl.Expr) -> pl.Expr:
    return message.struct.field("role")


_ELEMENT = pl.element()
_CONTENT = _ELEMENT.struct.field("content")


def _text(empty: str) -> pa.Column:
    """A text column; `empty` is the reason code of a value with nothing but white space."""
    return pa.Column(
        pl.String,
        checks=[
            _check("nul_byte", lambda key: ~_nul(pl.col(key))),
            _check(empty, lambda key: ~_blank(pl.col(key))),
        ],
    )


_ROW = pa.Column(pl.Int64, checks=pa.Check.ge(1, name="row_number"))

SPANS = pl.List(pl.Struct({"start": pl.Int64, "end": pl.Int64, "label": pl.String}))
_START, _END = (_ELEMENT.struct.field(name) for name in ("start", "end"))


def _spans() -> pa.Column:
    """Spans of the column `text`, by their start: characters, from 0, the end exclusive."""

    def within(key: str) -> pl.Expr:
        last = pl.col(key).list.eval(_END).list.max().fill_null(0)
        return last <= pl.col("text").str.len_chars()

    return pa.Column(
        SPANS,
        checks=[
            _every("span_out_of_range", (_START >= 0) & (_START < _END)),
            _check("span_out_of_range", within),
            _every("overlapping_spans", (_END.shift(1) <= _START).fill_null(True)),
            _every("empty_answer", ~_blank(_ELEMENT.struct.field("label"))),
            _every("nul_byte", ~_nul(_ELEMENT.struct.field("label"))),
        ],
    )


MESSAGES = pl.List(pl.Struct({"role": pl.String, "content": pl.String}))


def _schema(name: str, **columns: Any) -> pa.DataFrameSchema:
    return pa.DataFrameSchema({"row": _ROW, **columns}, name=name, strict=True, ordered=True)


#: Kind: contract. `row` is the line in the source file, from 1.
CONTRACTS: dict[Kind, pa.DataFrameSchema] = {
    "chat": _schema(
        "chat",
        messages=pa.Column(
            MESSAGES,
            checks=[
                _every("nul_byte", ~_nul(_CONTENT)),
                _every("unknown_role", _role(_ELEMENT).is_in(ROLES)),
                _check(
                    "no_answer",
                    lambda key: (_role(pl.col(key).list.last()) == "assistant").fill_null(False),
                ),
                _check(
                    "empty_prompt",
                    lambda key: (_role(pl.col(key).list.first()) != "assistant").fill_null(True),
                ),
                _every("empty_answer", ~((_role(_ELEMENT) == "assistant") & _blank(_CONTENT))),
            ],
        ),
    ),
    "completion": _schema(
        "completion", prompt=_text("empty_prompt"), completion=_text("empty_answer")
    ),
    "label": _schema("label", text=_text("empty_text"), label=_text("empty_answer")),
    "spans": _schema("spans", text=_text("empty_text"), spans=_spans()),
    "text": _schema("text", text=_text("empty_text")),
    # That it is an image is known by then: its content is what rows are compared by.
    "image": _schema("image", image=pa.Column(pl.String), label=_text("empty_answer")),
}

#: What was refused, one row a refused row, in the order of the files.
QUARANTINE = pa.DataFrameSchema(
    {
        "split": pa.Column(pl.String, pa.Check.isin(["train", "test", "retention"])),
        "file": pa.Column(pl.String),
        "line": pa.Column(pl.Int64, pa.Check.ge(1)),
        "raw": pa.Column(pl.String),
        "reasons": pa.Column(pl.List(pl.String)),
    },
    name="quarantine",
    strict=True,
    ordered=True,
)


def failures(kind: Kind, rows: pl.DataFrame) -> dict[int, list[str]]:
    """The rows of a frame that break their contract: index in the frame, reason codes.

    Raises:
        AssertionError: a failure of the frame itself (a column or type), which is our mistake.
    """
    try:
        CONTRACTS[kind].validate(rows, lazy=True)
    except pa.errors.SchemaErrors as error:
        found: dict[int, list[str]] = {}
        cases = error.failure_cases
        for index, check in zip(cases["index"], cases["check"], strict=True):
            assert index is not None, cases
            assert check in REASONS, cases
            found.setdefault(int(index), []).append(str(check))
        return found
    return {}
