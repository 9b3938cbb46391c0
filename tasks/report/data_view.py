"""The data report as tables: rows in, kept and refused, and a few of the refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

import polars as pl

from schemas.report import DataReport, SplitReport
from schemas.rows import REASONS
from schemas.tasks import TASKS, reads_images
from tasks.report.examples import clipped

#: Refused rows that are shown: one of each split and reason, no more than this in all.
SHOWN_REFUSED = 12

#: Characters of a refused row that are shown.
LONGEST_RAW = 240


@dataclass(frozen=True)
class SplitRow:
    name: str
    file: str
    split: SplitReport
    refused: int


@dataclass(frozen=True)
class ReasonRow:
    """A reason code, what it means, and the rows of each split that it refused."""

    reason: str
    meaning: str
    rows: list[int]


@dataclass(frozen=True)
class RefusedRow:
    split: str
    line: int
    reasons: str
    raw: str


@dataclass(frozen=True)
class Labels:
    """How many labels there are, and the rows (or spans) that each has in train, most first."""

    count: int
    fewest: int
    most: int
    rows: list[tuple[str, int]]
    what: str = "rows"


def split_rows(data: DataReport) -> list[SplitRow]:
    """One row a split. That nothing was lost is asserted once more: the page says so."""
    rows = []
    for name, split in data.splits.items():
        refused = sum(split.refused.values())
        assert split.rows_in == split.rows_kept + refused, f"{name}: rows were lost"
        rows.append(SplitRow(name, file_name(split.path), split, refused))
    return rows


def file_name(path: str) -> str:
    """A file without its directories; a hub id as it is."""
    return path if path.startswith("hub:") else PurePath(path).name


def reason_rows(data: DataReport) -> list[ReasonRow]:
    """Refusals of each reason by split, most first."""
    splits = list(data.splits.values())
    reasons = {reason for split in splits for reason in split.refused}
    rows = [
        ReasonRow(
            reason, REASONS.get(reason, ""), [split.refused.get(reason, 0) for split in splits]
        )
        for reason in reasons
    ]
    return sorted(rows, key=lambda row: (-sum(row.rows), row.reason))


def labels(data: DataReport) -> Labels | None:
    if not data.labels:
        return None
    rows = sorted(data.labels.items(), key=lambda item: (-item[1], item[0]))
    what = "spans" if TASKS[data.task].labels == "token" else "rows"
    return Labels(len(rows), rows[-1][1], rows[0][1], rows, what)


def row_words(data: DataReport) -> str:
    """What the base reads of a row, in words."""
    if reads_images(data.task):
        return f"The base makes {data.max_length:,} tokens of every image"
    return f"Template: {data.template}; at most {data.max_length:,} tokens a row"


def span_counts(data: DataReport) -> list[str]:
    """The spans of each split, where rows have some, in words."""
    return [
        f"{name}: {split.spans:,} spans, {split.spans_cut:,} of them cut off at max_length"
        for name, split in data.splits.items()
        if split.spans is not None
    ]


def refused_rows(quarantine: Path) -> list[RefusedRow]:
    """The first refused row of each split and first reason, in the order of the files."""
    frame = pl.scan_parquet(quarantine).select("split", "line", "reasons", "raw").with_row_index()
    code = pl.col("reasons").list.first().str.split(":").list.first()
    first = frame.group_by("split", code).agg(pl.col("index").min()).collect()
    wanted = sorted(first["index"].to_list())[:SHOWN_REFUSED]
    rows = frame.filter(pl.col("index").is_in(wanted)).sort("index").collect()
    return [
        RefusedRow(
            split=row["split"],
            line=row["line"],
            reasons=", ".join(row["reasons"]),
            raw=clipped(row["raw"], LONGEST_RAW),
        )
        for row in rows.iter_rows(named=True)
    ]
