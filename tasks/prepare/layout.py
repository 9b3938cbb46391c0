"""Which kind of rows a source holds, and which of its columns are ours."""

from __future__ import annotations

import difflib

from schemas.errors import UserError
from schemas.recipe import Source
from schemas.rows import COLUMNS, Kind
from schemas.tasks import Task, is_encoder_decoder
from tasks.prepare.blocks import Layout
from tasks.prepare.sources import Readable

#: Names that the field uses for our columns; offered as a fix, never taken without being asked.
ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("question", "instruction", "input", "query", "source"),
    "completion": ("answer", "response", "output", "target", "solution"),
    "text": ("sentence", "content", "body", "question", "utterance", "review", "document"),
    "label": ("category", "intent", "class", "tag", "target", "topic"),
    "spans": ("entities", "ents", "slots", "annotations", "labels"),
    "image": ("img", "picture", "photo", "file_name", "filename", "file", "path"),
}

#: The kinds of rows of each task, the preferred first.
KINDS: dict[Task, list[Kind]] = {
    "causal-lm": ["chat", "completion"],
    "seq2seq": ["completion"],
    "sequence-classification": ["label"],
    "token-classification": ["spans"],
    "image-classification": ["image"],
}

#: Columns that an error lists by name before it counts the rest.
LISTED = 12


def find_layout(task: Task, split: str, source: Source, readable: Readable) -> Layout:
    """The kind and columns of a split, by the recipe's mapping, else by our own names.

    Raises:
        UserError: a column that the kind needs is not in the file.
    """
    kinds = kinds_of(task, split)
    columns = readable.columns
    mapping: dict[str, str] = dict(source.columns)  # type: ignore[arg-type]
    sources = {name: mapping.get(name, name) for kind in kinds for name in COLUMNS[kind]}
    place = f"{readable.name} (data.{split}.columns)"
    for name, mapped in mapping.items():
        if name not in sources:
            raise UserError.at(
                place,
                f"`{name}` is no column of {task} rows",
                f"map {' or '.join(describe(kind) for kind in kinds)}",
            )
        if columns and mapped not in columns:
            raise UserError.at(
                place,
                f"no column {mapped!r}; {listed(columns)}",
                f"map `{name}` to {nearest(mapped, name, columns)}",
            )
    chosen = next(
        (kind for kind in kinds if all(sources[name] in columns for name in COLUMNS[kind])), None
    )
    if chosen is None and columns:
        missing = {
            name: sources[name]
            for name in COLUMNS[closest_kind(kinds, sources, columns)]
            if sources[name] not in columns
        }
        wanted = " or ".join(describe(kind) for kind in kinds)
        fixes = [f"{name}: {nearest(mapped, name, columns)}" for name, mapped in missing.items()]
        raise UserError.at(
            readable.name,
            f"no column {', '.join(map(repr, missing.values()))}; {listed(columns)}",
            f"rows need {wanted}; map them with data.{split}.columns, e.g. {{{', '.join(fixes)}}}",
        )
    kind = chosen or kinds[-1]
    repeated = [name for name in COLUMNS[kind] if columns.count(sources[name]) > 1]
    if repeated:
        raise UserError.at(
            readable.name,
            f"more than one column is named {sources[repeated[0]]!r}",
            "give each column a name of its own",
        )
    return Layout(kind, {name: sources[name] for name in COLUMNS[kind]}, readable.root)


def kinds_of(task: Task, split: str) -> list[Kind]:
    """The kinds of rows that a split may hold, the preferred first."""
    if split == "retention" and not is_encoder_decoder(task):
        return ["text"]
    return KINDS[task]


def closest_kind(kinds: list[Kind], sources: dict[str, str], columns: list[str]) -> Kind:
    """The kind of which the fewest columns are missing; the last of equals."""

    def missing(kind: Kind) -> int:
        return sum(sources[name] not in columns for name in COLUMNS[kind])

    guesses = [kind for kind in kinds if any(alias_in(name, columns) for name in COLUMNS[kind])]
    return min(reversed(guesses or kinds), key=missing)


def alias_in(name: str, columns: list[str]) -> str | None:
    lower = {column.lower(): column for column in columns}
    return next((lower[alias] for alias in (name, *ALIASES[name]) if alias in lower), None)


def nearest(mapped: str, name: str, columns: list[str]) -> str:
    """The column that was probably meant, as a fix to write."""
    close = difflib.get_close_matches(mapped, columns, n=1)
    guess = close[0] if close else alias_in(name, columns)
    return guess or "<one of the columns found>"


def describe(kind: Kind) -> str:
    return " and ".join(f"`{name}`" for name in COLUMNS[kind])


def listed(columns: list[str]) -> str:
    """The columns found, in words."""
    shown = ", ".join(columns[:LISTED])
    more = f" and {len(columns) - LISTED} more" if len(columns) > LISTED else ""
    return f"the file has {len(columns)} columns: {shown}{more}"
