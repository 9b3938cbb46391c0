"""Held-out rows as somebody asks them, beside the tokens with which they were evaluated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.tokens import TokenRows


@dataclass(frozen=True)
class Asked:
    """text: what a user of the version would send; of an image its file. tokens: of the whole row,
    a list of ids; of an image its pixel values, float32 [C, H, W].

    prompt: the tokens before the answer, or all of them for a classifier.
    """

    text: str | bytes
    tokens: Any
    prompt: Any


def held_out_rows(prepared: Path, count: int) -> list[Asked]:
    """The first `count` test rows of a prepare entry."""
    import polars as pl

    rows = TokenRows.load(prepared / "tokens" / "test.safetensors")
    wanted = rows.source_rows[:count].tolist()
    table = pl.scan_parquet(prepared / "rows" / "test.parquet")
    found = {
        row["row"]: row
        for row in table.filter(pl.col("row").is_in(wanted)).collect().iter_rows(named=True)
    }
    asked = []
    for index, number in enumerate(wanted):
        if rows.pixels is not None:
            [pixels_CHW] = rows.images(np.array([index]))
            asked.append(Asked(found[number]["image"], pixels_CHW, pixels_CHW))
            continue
        tokens = rows.row(index).tolist()
        end = len(tokens) if rows.answer_start is None else int(rows.answer_start[index])
        asked.append(Asked(question(found[number]), tokens, tokens[:end]))
    return asked


def question(row: dict[str, Any]) -> str:
    """A row without its answer: a text, a prompt, or a conversation as JSON."""
    if "messages" not in row:
        return str(row["text"] if "text" in row else row["prompt"])
    before = row["messages"][:-1]
    if len(before) == 1 and before[0]["role"] == "user":
        return str(before[0]["content"])
    return json.dumps(before, ensure_ascii=False)
