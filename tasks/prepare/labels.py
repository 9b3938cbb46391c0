"""The labels of a classification task: those of train, in alphabetical order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.recipe import HoldOut
from schemas.stages import PrepareSpec
from tasks.core.progress import warn
from tasks.prepare.ingest import frames_of
from tasks.prepare.split import Split
from tasks.prepare.tokenize import BATCH_ROWS, Tokenized

#: Labels that train never saw which an error names.
LABELS_SHOWN = 10


def label_column(split: Split) -> list[str]:
    frames = frames_of(split.ingested, split.kept, BATCH_ROWS)
    return pl.concat([frame["label"] for frame in frames]).to_list()


def settle_labels(
    spec: PrepareSpec, splits: dict[str, Split], tokens: dict[str, Tokenized]
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
        tokens["test"] = tokens["test"].keep(known)
        found = [label for label in found if label in names]
    for split, column in (("train", label_column(splits["train"])), ("test", found)):
        numbers = np.array([names[label] for label in column], np.int64)
        rows = replace(tokens[split].rows, labels=numbers)
        tokens[split] = replace(tokens[split], rows=rows)
    return {label: counts[label] for label in names}


def refuse_unknown(
    spec: PrepareSpec, test: Split, found: list[str], known: NDArray[np.bool_]
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
