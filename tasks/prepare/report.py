"""What is written beside the tokens: the quarantine, the test rows in plain words, the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.report import DataReport, LengthHistogram, SplitReport
from schemas.rows import QUARANTINE, Kind
from tasks.core.pictures import BASE64
from tasks.core.progress import say
from tasks.core.tokens import TokenRows
from tasks.prepare.sources import recall
from tasks.prepare.split import Split
from tasks.prepare.tokenize import Tokenized

#: Refused rows that are written at a time.
BATCH_ROWS = 5000

#: Bars of a length histogram, at most.
BARS = 32

QUARANTINE_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "file": pa.string(),
        "line": pa.int64(),
        "raw": pa.string(),
        "reasons": pa.list_(pa.string()),
    }
)


def write_quarantine(splits: list[Split], path: Path) -> int:
    """Write every refused row with its raw text and all its reasons; returns how many."""

    def rows() -> Iterator[dict[str, Any]]:
        for split in splits:
            source = split.ingested.source
            for line in split.all_refused():
                yield {
                    "split": split.name,
                    "file": source.name,
                    "line": line.line,
                    "raw": recall(source.path, line.offset, line.length),
                    "reasons": line.reasons,
                }

    written, pending = 0, rows()
    with pq.ParquetWriter(path, QUARANTINE_SCHEMA, compression="zstd") as writer:
        while batch := list(islice(pending, BATCH_ROWS)):
            table = pa.Table.from_pylist(batch, QUARANTINE_SCHEMA)
            QUARANTINE.validate(pl.from_arrow(table))
            writer.write_table(table)
            written += len(batch)
    return written


def write_test_rows(kind: Kind, rows: Iterator[pl.DataFrame], path: Path) -> None:
    """One JSON object a line, in the order of tokens/test.safetensors: what a person reads."""
    with path.open("w", encoding="utf-8") as file:
        for frame in rows:
            for row in frame.iter_rows(named=True):
                # ASCII: a line separator within a text must not look like the end of a line.
                file.write(json.dumps({"row": row["row"], **plain_words(kind, row)}) + "\n")


def plain_words(kind: Kind, row: dict[str, Any]) -> dict[str, Any]:
    if kind == "image":
        named = not row["image"].startswith(BASE64)
        return {"prompt": row["image"] if named else f"image {row['row']}", "label": row["label"]}
    if kind == "label":
        return {"prompt": row["text"], "label": row["label"]}
    if kind == "spans":
        return {"prompt": row["text"], "spans": row["spans"]}
    if kind == "completion":
        return {"prompt": row["prompt"], "answer": row["completion"]}
    *before, last = row["messages"]
    if len(before) == 1:
        prompt = before[0]["content"]
    else:
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in before)
    return {"prompt": prompt, "answer": last["content"]}


def split_report(split: Split, tokens: Tokenized) -> SplitReport:
    """The figures of one split. Asserts that no row has vanished."""
    rows = tokens.rows
    spans, cut = (None, None) if tokens.spans_N2 is None else tokens.spans_N2.sum(0).tolist()
    refused = split.refused_by_reason()
    kept = int(split.kept.sum())
    assert len(rows) == kept, f"{split.name}: {len(rows)} token rows for {kept} rows kept"
    assert split.rows_in == kept + sum(refused.values()), f"{split.name}: rows are missing"
    return SplitReport(
        path=split.ingested.source.name,
        rows_in=split.rows_in,
        rows_kept=kept,
        refused=refused,
        truncated=int(tokens.truncated.sum()),
        label_less=refused.get("no_answer_token", 0),
        tokens=len(rows.input_ids),
        answer_tokens=0 if rows.loss_mask is None else int(rows.loss_mask.sum()),
        lengths=histogram(rows),
        spans=spans,
        spans_cut=cut,
    )


def histogram(rows: TokenRows) -> LengthHistogram:
    """Row lengths in bars of one width, a whole number of tokens."""
    longest = int(rows.lengths.max(initial=0))
    width = max(1, -(-(longest + 1) // BARS))
    edges = list(range(0, longest + width + 1, width))
    counts, _ = np.histogram(rows.lengths, bins=edges)
    return LengthHistogram(edges=edges, counts=counts.tolist())


def facts_of(report: DataReport) -> dict[str, Any]:
    """The key figures: all of the report but its histograms."""
    return {
        "template": report.template,
        "max_length": report.max_length,
        "labels": len(report.labels),
        "splits": {
            name: split.model_dump(exclude={"lengths"}) for name, split in report.splits.items()
        },
    }


def say_report(report: DataReport) -> None:
    """One line a split."""
    for name, split in report.splits.items():
        reasons = ", ".join(f"{count} {reason}" for reason, count in split.refused.items())
        spans = "" if split.spans is None else f", {split.spans} spans, {split.spans_cut} cut off"
        say(
            f"{name}: {split.rows_in} rows in = {split.rows_kept} kept + "
            f"{sum(split.refused.values())} refused{f' ({reasons})' if reasons else ''}; "
            f"{split.truncated} truncated, {split.label_less} label-less; "
            f"{split.tokens} tokens{spans}"
        )
