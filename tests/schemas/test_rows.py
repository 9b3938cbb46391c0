"""The row contracts: each check refuses what its name says, and nothing else."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from schemas.rows import COLUMNS, CONTRACTS, MESSAGES, REASONS, Kind, failures

ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}


def frame(kind: Kind, *rows: Any) -> pl.DataFrame:
    schema: dict[str, Any] = {"row": pl.Int64}
    for name in COLUMNS[kind]:
        schema[name] = MESSAGES if name == "messages" else pl.String
    records = [
        dict(zip(schema, (number, *row), strict=True)) for number, row in enumerate(rows, start=1)
    ]
    return pl.DataFrame(records, schema=schema)


@pytest.mark.parametrize(
    ("messages", "reasons"),
    [
        ([ASKED, ANSWERED], []),
        ([{"role": "system", "content": ""}, ASKED, ANSWERED], []),
        ([], ["no_answer"]),
        ([ASKED], ["no_answer"]),
        ([ANSWERED], ["empty_prompt"]),
        ([ASKED, {"role": "assistant", "content": "\u2003"}], ["empty_answer"]),
        ([{"role": "bot", "content": "a"}, ANSWERED], ["unknown_role"]),
        ([{"role": "user", "content": "\0"}, ANSWERED], ["nul_byte"]),
        ([ASKED, {"role": "assistant", "content": " "}, ASKED], ["no_answer", "empty_answer"]),
    ],
)
def test_chat(messages: list[dict[str, str]], reasons: list[str]) -> None:
    good = ([ASKED, ANSWERED],)
    found = failures("chat", frame("chat", good, (messages,), good))
    assert found == ({1: reasons} if reasons else {})


def test_texts() -> None:
    pairs = frame("completion", ("a", "b"), ("", "b"), ("a", "\t"), ("\0", " "))
    assert failures("completion", pairs) == {
        1: ["empty_prompt"],
        2: ["empty_answer"],
        3: ["nul_byte", "empty_answer"],
    }
    assert failures("label", frame("label", (" ", ""))) == {0: ["empty_text", "empty_answer"]}
    assert failures("text", frame("text", ("a",), ("",))) == {1: ["empty_text"]}


def test_the_name_of_every_check_is_a_reason() -> None:
    for contract in CONTRACTS.values():
        for name, column in contract.columns.items():
            if name != "row":
                assert {check.name for check in column.checks} <= set(REASONS)


def test_a_frame_of_the_wrong_form_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        failures("text", pl.DataFrame({"row": [1], "text": [3]}))
    with pytest.raises(AssertionError):
        failures("text", pl.DataFrame({"row": [1], "text": ["a"], "more": ["b"]}))


def test_failures_keep_their_rows_in_a_long_frame() -> None:
    rows = [("a", "b") if number % 1000 else ("a", "") for number in range(20_000)]
    found = failures("completion", frame("completion", *rows))
    assert found == {number: ["empty_answer"] for number in range(0, 20_000, 1000)}
