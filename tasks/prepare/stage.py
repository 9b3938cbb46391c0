"""Prepare: rows from files, held against their contract, as tokens. Nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from schemas.errors import UserError
from schemas.recipe import HoldOut, Source
from schemas.report import DataReport
from schemas.stages import PrepareSpec
from tasks.core.files import write_atomic
from tasks.core.progress import warn
from tasks.core.store import SCRATCH
from tasks.core.tokens import TokenRows
from tasks.prepare.blocks import Layout
from tasks.prepare.ingest import Ingested, frames_of, ingest, write_rows
from tasks.prepare.layout import find_layout
from tasks.prepare.reader import Reader, open_reader
from tasks.prepare.report import (
    facts_of,
    say_report,
    split_report,
    write_quarantine,
    write_test_rows,
)
from tasks.prepare.same import held_out, sampled
from tasks.prepare.sources import Readable, open_source
from tasks.prepare.spans import Counts
from tasks.prepare.split import Split
from tasks.prepare.tokenize import BATCH_ROWS, take, tokenize_split

#: Labels that train never saw which an error names.
LABELS_SHOWN = 10


@dataclass
class Tokens:
    rows: TokenRows
    counts: Counts


def run(spec: PrepareSpec, paths: dict[str, Path], out: Path) -> dict[str, Any]:
    """Make a prepare entry in `out`; see `schemas.stages.PrepareSpec` for what it holds.

    Raises:
        UserError: a file, column, template or label with which nothing can be learned.
    """
    for leftover in out.iterdir():  # of a killed attempt: this stage starts anew
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    scratch = out / SCRATCH
    opened = open_sources(spec, paths, scratch)
    kinds = {layout.kind for _, layout in opened.values()}
    reader = open_reader(paths["base"], spec.task, spec.data, kinds)
    ingested = {
        name: ingest(readable, layout, scratch / name)
        for name, (readable, layout) in opened.items()
    }
    splits = sort_splits(spec, ingested)
    tokens = {name: tokenize(split, reader) for name, split in splits.items()}
    if spec.data.test_rows is not None:
        tokens["test"] = sample(splits["test"], tokens["test"], spec.data.test_rows)
    labels = None
    if spec.task == "sequence-classification":
        labels = settle_labels(spec, splits, tokens)
    return write(spec, out, splits, tokens, reader, labels)


def open_sources(
    spec: PrepareSpec, paths: dict[str, Path], scratch: Path
) -> dict[str, tuple[Readable, Layout]]:
    """Every source with its layout; what is wrong with any of them is said at once."""
    data = spec.data
    given = {"test": data.test, "train": data.train, "retention": data.retention}
    opened, problems = {}, []
    for name, source in given.items():
        if not isinstance(source, Source):
            continue
        (scratch / name).mkdir(parents=True, exist_ok=True)
        try:
            readable = open_source(source, paths.get(name), scratch / name)
            opened[name] = readable, find_layout(spec.task, name, source, readable)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return opened


def sort_splits(spec: PrepareSpec, ingested: dict[str, Ingested]) -> dict[str, Split]:
    """The splits, without duplicates, and train without what stands in test."""
    splits = {name: whole(name, rows) for name, rows in ingested.items()}
    if isinstance(spec.data.test, HoldOut):
        train = splits["train"]
        held = held_out(train.ingested.digests, spec.data.test.holdout)
        train.members &= ~held
        splits["test"] = Split("test", train.ingested, held, [])
    ordered = {name: splits[name] for name in ("train", "test", "retention") if name in splits}
    for split in ordered.values():
        split.refuse_duplicates()
    ordered["train"].refuse_leaks(ordered["test"])
    for split in ordered.values():
        split.require_rows()
    return ordered


def whole(name: str, ingested: Ingested) -> Split:
    return Split(name, ingested, np.ones(len(ingested), bool), ingested.refused)


def tokenize(split: Split, reader: Reader) -> Tokens:
    """The tokens of a split; rows that cannot be used are refused from it."""
    kind = split.ingested.layout.kind
    kept = split.kept
    done = tokenize_split(
        frames_of(split.ingested, kept, BATCH_ROWS),
        int(kept.sum()),
        kind,
        reader.backend,
        reader.rules(kind),
        label=f"tokenising {split.name}",
        render=reader.renderer(kind),
    )
    places = np.flatnonzero(kept)
    for place, reason in done.refused.items():
        split.refuse(int(places[place]), reason)
    split.require_rows()
    speak_of(split.name, done.counts, reader)
    return Tokens(done.rows, done.counts)


def speak_of(name: str, counts: Counts, reader: Reader) -> None:
    """What training would otherwise do quietly."""
    if counts.merged_borders:
        warn(
            f"{name}: in {counts.merged_borders} rows one token spans the border of prompt and "
            "answer; it is learned with the answer, though the prompt alone ends otherwise. "
            "Let prompts end, or answers begin, with a space or newline."
        )
    if counts.eos_appended and reader.template == "chat":
        warn(
            f"{name}: the chat template closes {counts.eos_appended} last answers with no stop "
            f"token; {reader.tokenizer.eos_token!r} is appended"
        )
    if counts.open_answers:
        warn(
            f"{name}: the chat template closes {counts.open_answers} earlier answers with no stop "
            "token; where they end is not learned"
        )
    if counts.prompts_differ:
        warn(
            f"{name}: in {counts.prompts_differ} rows the chat template writes the answer's turn "
            "otherwise than its generation prompt begins; the model will be asked with a text "
            "that it has not learned"
        )


def sample(test: Split, tokens: Tokens, count: int) -> Tokens:
    """Keep `count` test rows, chosen by their hashes."""
    places = np.flatnonzero(test.kept)
    chosen = sampled(test.ingested.digests[places], count)
    for place in places[~chosen]:
        test.refuse(int(place), "not_sampled")
    return Tokens(take(tokens.rows, chosen), tokens.counts)


def label_column(split: Split) -> list[str]:
    frames = frames_of(split.ingested, split.kept, BATCH_ROWS)
    return pl.concat([frame["label"] for frame in frames]).to_list()


def settle_labels(
    spec: PrepareSpec, splits: dict[str, Split], tokens: dict[str, Tokens]
) -> dict[str, int]:
    """Number the labels of train, in alphabetical order; returns how many rows each has.

    Raises:
        UserError: a test file has labels that train never saw.
    """
    counts = Counter(label_column(splits["train"]))
    names = {label: index for index, label in enumerate(sorted(counts))}
    if len(names) < 2:
        raise UserError.at(
            splits["train"].ingested.source.name,
            f"every train row has the label {next(iter(names))!r}",
            "give rows of at least two labels",
        )
    test = splits["test"]
    found = label_column(test)
    known = np.array([label in names for label in found])
    if not known.all():
        refuse_unknown(spec, test, found, known)
        tokens["test"] = Tokens(take(tokens["test"].rows, known), tokens["test"].counts)
        found = [label for label in found if label in names]
    for split, column in (("train", label_column(splits["train"])), ("test", found)):
        numbers = np.array([names[label] for label in column], np.int64)
        tokens[split].rows = replace(tokens[split].rows, labels=numbers)
    return {label: counts[label] for label in names}


def refuse_unknown(
    spec: PrepareSpec, test: Split, found: list[str], known: np.ndarray[Any, np.dtype[np.bool_]]
) -> None:
    """A file with labels that train lacks is a mistake; a hold-out may hold a rare label whole."""
    places = np.flatnonzero(test.kept)[~known]
    unknown = [label for label, is_known in zip(found, known, strict=True) if not is_known]
    if isinstance(spec.data.test, HoldOut):
        for place, label in zip(places, unknown, strict=True):
            test.refuse(int(place), f"unknown_label:{label}")
        warn(
            f"test: {len(unknown)} held-out rows have labels that no train row has: "
            f"{', '.join(sorted(set(unknown))[:LABELS_SHOWN])}; they are refused"
        )
        test.require_rows()
        return
    lines: dict[str, list[int]] = {}
    for place, label in zip(places, unknown, strict=True):
        lines.setdefault(label, []).append(int(test.ingested.lines[place]))
    shown = ", ".join(
        f"{label!r} (line {', '.join(map(str, numbers[:3]))}{', …' if numbers[3:] else ''})"
        for label, numbers in sorted(lines.items())[:LABELS_SHOWN]
    )
    more = f" and {len(lines) - LABELS_SHOWN} more" if len(lines) > LABELS_SHOWN else ""
    raise UserError.at(
        test.ingested.source.name,
        f"labels that no kept train row has: {shown}{more}",
        "correct them, add train rows with these labels, or take the test rows out",
    )


def write(
    spec: PrepareSpec,
    out: Path,
    splits: dict[str, Split],
    tokens: dict[str, Tokens],
    reader: Reader,
    labels: dict[str, int] | None,
) -> dict[str, Any]:
    """Write the entry's files; returns its facts."""
    (out / "tokens").mkdir()
    for name, split in splits.items():
        write_rows(split.ingested, split.kept, out / "rows" / f"{name}.parquet")
        tokens[name].rows.save(out / "tokens" / f"{name}.safetensors")
    test = splits["test"]
    write_test_rows(
        test.ingested.layout.kind,
        frames_of(test.ingested, test.kept, BATCH_ROWS),
        out / "test_rows.jsonl",
    )
    report = DataReport(
        task=spec.task,
        template=reader.template,
        max_length=spec.data.max_length,
        splits={
            name: split_report(split, tokens[name].rows, tokens[name].counts)
            for name, split in splits.items()
        },
        labels=labels or {},
    )
    refused = write_quarantine(list(splits.values()), out / "quarantine.parquet")
    assert refused == sum(sum(split.refused.values()) for split in report.splits.values())
    if labels is not None:
        write_atomic(out / "labels.json", json.dumps(list(labels), ensure_ascii=False))
    write_atomic(out / "data_report.json", report.model_dump_json(indent=1))
    say_report(report)
    return facts_of(report)
