"""Prepare: rows from files, held against their contract, as tokens. Nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import UserError
from schemas.recipe import HoldOut, Source
from schemas.report import DataReport
from schemas.stages import PrepareSpec
from schemas.tasks import is_labelled, reads_images
from tasks.core.files import write_atomic
from tasks.core.progress import warn
from tasks.core.store import SCRATCH
from tasks.prepare.blocks import Layout
from tasks.prepare.compose import Mismatch
from tasks.prepare.ingest import Ingested, frames_of, ingest, write_rows
from tasks.prepare.labels import head_labels, settle_labels
from tasks.prepare.layout import find_layout
from tasks.prepare.pixels import PixelReader, open_pixels
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
from tasks.prepare.tokenize import BATCH_ROWS, Tokenized, tokenize_split


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
    if reads_images(spec.task):
        reader: Reader | PixelReader = open_pixels(paths["base"], spec.task, scratch)
    else:
        reader = open_reader(paths["base"], spec.task, spec.data, kinds)
    ingested = {
        name: ingest(readable, layout, scratch / name)
        for name, (readable, layout) in opened.items()
    }
    splits = sort_splits(spec, ingested)
    tokens = {name: read(split, reader) for name, split in splits.items()}
    if spec.data.test_rows is not None:
        tokens["test"] = sample(splits["test"], tokens["test"], spec.data.test_rows)
    labels = None
    if is_labelled(spec.task):
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
        train, share = splits["train"], spec.data.test
        taken = held_out(train.ingested.digests, share.after)
        held = held_out(train.ingested.digests, share.after + share.holdout) & ~taken
        if not held.any():
            raise UserError.at(
                "data.test",
                f"a hold-out of {share.holdout} takes none of {len(held)} rows",
                "raise data.test.holdout, or give a test file",
            )
        train.members &= ~(held | taken)
        splits["test"] = Split("test", train.ingested, held, [])
    order = ["train", "test", "retention"]
    ordered = {name: splits[name] for name in order if name in splits}
    for split in ordered.values():
        split.refuse_duplicates()
    ordered["train"].refuse_leaks(ordered["test"])
    for split in ordered.values():
        split.require_rows()
    return ordered


def whole(name: str, ingested: Ingested) -> Split:
    return Split(name, ingested, np.ones(len(ingested), bool), ingested.refused)


def read(split: Split, reader: Reader | PixelReader) -> Tokenized:
    """What the base reads of a split's rows."""
    return reader.read(split) if isinstance(reader, PixelReader) else tokenize(split, reader)


def tokenize(split: Split, reader: Reader) -> Tokenized:
    """The tokens of a split; rows that cannot be used are refused from it."""
    try:
        done = tokens_of(split, reader)
    except Mismatch:
        warn(
            f"{split.name}: rows joined from the chat template's literals are not what it renders; "
            "all are rendered one by one, which is slower"
        )
        done = tokens_of(split, reader, compose=False)
    kept = split.kept
    places = np.flatnonzero(kept)
    for place, reason in done.refused.items():
        split.refuse(int(places[place]), reason)
    split.require_rows()
    speak_of(split.name, done.counts, reader)
    return done


def tokens_of(split: Split, reader: Reader, *, compose: bool = True) -> Tokenized:
    kind = split.ingested.layout.kind
    return tokenize_split(
        frames_of(split.ingested, split.kept, BATCH_ROWS),
        int(split.kept.sum()),
        kind,
        reader.backend,
        reader.rules(kind),
        label=f"tokenising {split.name}",
        text=reader.text_rules(kind, compose=compose),
    )


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


def sample(test: Split, tokens: Tokenized, count: int) -> Tokenized:
    """Keep `count` test rows, chosen by their hashes."""
    places = np.flatnonzero(test.kept)
    chosen = sampled(test.ingested.digests[places], count)
    for place in places[~chosen]:
        test.refuse(int(place), "not_sampled")
    return tokens.keep(chosen)


def write(
    spec: PrepareSpec,
    out: Path,
    splits: dict[str, Split],
    tokens: dict[str, Tokenized],
    reader: Reader | PixelReader,
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
        max_length=reader.max_length,
        splits={name: split_report(split, tokens[name]) for name, split in splits.items()},
        labels=labels or {},
    )
    refused = write_quarantine(list(splits.values()), out / "quarantine.parquet")
    assert refused == sum(sum(split.refused.values()) for split in report.splits.values())
    if labels is not None:
        write_atomic(out / "labels.json", json.dumps(head_labels(spec, labels), ensure_ascii=False))
    write_atomic(out / "data_report.json", report.model_dump_json(indent=1))
    say_report(report)
    return facts_of(report)
