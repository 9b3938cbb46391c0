"""The labels of a task that has some: those of train, in alphabetical order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import numpy as np
import polars as pl

from schemas.errors import UserError
from schemas.recipe import HoldOut
from schemas.stages import PrepareSpec
from schemas.tasks import TASKS
from tasks.core.entities import label_names
from tasks.core.progress import warn
from tasks.prepare.ingest import frames_of
from tasks.prepare.split import Split
from tasks.prepare.tags import renumbered
from tasks.prepare.tokenize import BATCH_ROWS, Tokenized

#: Labels that train never saw which an error names.
LABELS_SHOWN = 10


def labels_by_row(split: Split) -> list[list[str]]:
    """The labels of each kept row: one, or one a span."""
    column = "spans" if split.ingested.layout.kind == "spans" else "label"
    frames = pl.concat(list(frames_of(split.ingested, split.kept, BATCH_ROWS, [column])))
    if column == "spans":
        return frames["spans"].list.eval(pl.element().struct.field("label")).to_list()
    return [[label] for label in frames["label"].to_list()]


def settle_labels(
    spec: PrepareSpec, splits: dict[str, Split], tokens: dict[str, Tokenized]
) -> dict[str, int]:
    """Number the labels of train, in alphabetical order; returns how many rows each has (where
    spans have labels: how many spans).

    Raises:
        UserError: train has too few labels, or a test file has some that train never saw.
    """
    counts = Counter(chain.from_iterable(labels_by_row(splits["train"])))
    names = {label: index for index, label in enumerate(sorted(counts))}
    require_choice(spec, splits["train"], names)
    test = splits["test"]
    found = labels_by_row(test)
    known = np.array([names.keys() >= set(labels) for labels in found])
    if not known.all():
        unknown = [[label for label in labels if label not in names] for labels in found]
        refuse_unknown(spec, test, unknown)
        tokens["test"] = tokens["test"].keep(known)
    for name in ("train", "test"):
        tokens[name] = numbered(splits[name], tokens[name], names)
    return {label: counts[label] for label in names}


def require_choice(spec: PrepareSpec, train: Split, names: dict[str, int]) -> None:
    """Raise a UserError where there is nothing to choose between."""
    source = train.ingested.source.name
    if TASKS[spec.task].labels == "token":
        if not names:
            raise UserError.at(source, "no train row has a span", "give rows with spans")
    elif len(names) < 2:
        raise UserError.at(
            source,
            f"every train row has the label {next(iter(names))!r}",
            "give rows of at least two labels",
        )


def numbered(split: Split, tokens: Tokenized, names: dict[str, int]) -> Tokenized:
    """The token rows with the number of each label."""
    if tokens.rows.token_labels is not None:
        # A type of which only refused rows had a span is no token's.
        numbers = [names.get(label, 0) for label in tokens.types]
        labels = renumbered(tokens.rows.token_labels, numbers)
        return replace(tokens, rows=replace(tokens.rows, token_labels=labels))
    column = [names[label] for [label] in labels_by_row(split)]
    return replace(tokens, rows=replace(tokens.rows, labels=np.array(column, np.int64)))


def head_labels(spec: PrepareSpec, names: Iterable[str]) -> list[str]:
    """The outputs of the head, in their order."""
    return label_names(list(names)) if TASKS[spec.task].labels == "token" else list(names)


def refuse_unknown(spec: PrepareSpec, test: Split, by_row: list[list[str]]) -> None:
    """A file with labels that train lacks is a mistake; a hold-out may hold a rare label whole.

    by_row: the labels of each kept row that train lacks.
    """
    rows = zip(np.flatnonzero(test.kept).tolist(), by_row, strict=True)
    found = [(place, label) for place, labels in rows for label in dict.fromkeys(labels)]
    if isinstance(spec.data.test, HoldOut):
        for place, label in found:
            test.refuse(place, f"unknown_label:{label}")
        names = sorted({label for _, label in found})
        warn(
            f"test: {len({place for place, _ in found})} held-out rows have labels that no train "
            f"row has: {', '.join(names[:LABELS_SHOWN])}; they are refused"
        )
        test.require_rows()
        return
    lines: dict[str, list[int]] = {}
    for place, label in found:
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
