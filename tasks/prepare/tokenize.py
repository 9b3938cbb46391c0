"""The rows of one split as tokens.

The tokenizer encodes whole batches on all cores with Python's lock released, in a thread, while
this process renders the next batch and gathers the last. Where a token stands in its text is
found from the tokens if they are bytes (`tasks/prepare/locate.py`), else told by the tokenizer.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.rows import LABELLED, Kind
from tasks.core.progress import bar
from tasks.core.tokens import TokenRows
from tasks.prepare.locate import Located, byte_tokens
from tasks.prepare.records import Span as RowSpan
from tasks.prepare.render import Render, Rendered, TemplateRefused
from tasks.prepare.spans import Counts, Rules, Span, Unfit, causal_row, cut_text, pair_row
from tasks.prepare.tags import Tags

#: Rows that are encoded at a time: enough for all cores, few enough to stay in their caches.
BATCH_ROWS = 2048
#: Batches that are encoded while another is gathered. With two the cores have work where the
#: longest text of a batch, or the handing over of its tokens, would leave some idle.
AHEAD = 2


@dataclass(frozen=True)
class TextRules:
    """How rows become text. render: None for rows that are a text already, or two, of which an
    encoder reads one and a decoder writes the other.

    control_words: special tokens that no content may spell, lest it be read as the template's.
    stop_words: those that no completion may spell, lest it end early. (A plain prompt may.)
    """

    render: Render | None = None
    control_words: list[str] = field(default_factory=list)
    stop_words: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tokenized:
    """The token rows of a split (without labels), and what became of each row given.

    refused: place of the row among those given, its reason. truncated: of the rows kept.
    types: of spans, as they are numbered here. spans_N2: each kept row's spans, and those cut.
    """

    rows: TokenRows
    truncated: NDArray[np.bool_]
    refused: dict[int, str]
    counts: Counts
    types: list[str] = field(default_factory=list)
    spans_N2: NDArray[np.int64] | None = None

    def keep(self, chosen: NDArray[np.bool_]) -> Tokenized:
        """Of the token rows only those of a mask."""
        spans_N2 = None if self.spans_N2 is None else self.spans_N2[chosen]
        rows, truncated = self.rows.take(chosen), self.truncated[chosen]
        return replace(self, rows=rows, truncated=truncated, spans_N2=spans_N2)


def tokenize_split(
    frames: Iterable[pl.DataFrame],
    total: int,
    kind: Kind,
    tokenizer: Any,
    rules: Rules,
    *,
    label: str,
    text: TextRules,
) -> Tokenized:
    """Tokenise the rows of a split, which come as frames of BATCH_ROWS or fewer.

    tokenizer: a `tokenizers.Tokenizer`. label: what the bar says.
    """
    counts, refused = Counts(), dict[int, str]()
    gathered, truncated = Gathered(causal=kind not in LABELLED), list[bool]()
    tags = Tags() if kind == "spans" else None

    def texts() -> Iterator[tuple[list[str], Batch]]:
        start = 0
        for frame in frames:
            batch = Batch(start, frame)
            yield batch.render(kind, text, refused), batch
            start += len(frame)

    # Spans ask where every token stands, not a few of them.
    table = (
        byte_tokens(tokenizer, add_special=rules.add_special, suffix=rules.suffix)
        if tags is None
        else None
    )
    encode = tokenizer.encode_batch if table is None else tokenizer.encode_batch_fast
    special = rules.add_special

    def located(encoding: Any, text: str) -> Located:
        found = None if table is None else table.locate(encoding.ids, text)
        if found is None and table is not None:
            return tokenizer.encode(text, add_special_tokens=special)  # type: ignore[no-any-return]
        return found or encoding

    with without_collector(), bar(label, total, "rows") as progress:
        for encodings, batch in encoded(encode, texts(), add_special=special):
            rows: list[list[int]] = []
            spans: list[list[Span]] = []
            good: list[int] = []
            for index, encoding, beside in batch.encoded(encodings):
                try:
                    if isinstance(beside, Rendered):
                        where = located(encoding, beside.text)
                        ids, learned, cut = causal_row(where, beside, rules, counts)
                    elif beside is not None:
                        ids, learned, cut = pair_row(encoding, beside, rules)
                    else:
                        ids, cut = cut_text(encoding.ids, rules)
                        learned = text_span(ids) if kind == "text" else []
                    if tags is not None:
                        tags.add(*batch.marked(index), encoding.offsets, rules, cut=cut)
                except Unfit as unfit:
                    refused[batch.start + index] = str(unfit.args[0])
                    continue
                rows.append(ids)
                spans.append(learned)
                good.append(index)
                truncated.append(cut)
            gathered.add(rows, spans, batch.frame["row"].to_numpy()[good])
            progress.advance(len(batch.frame))
    done = Tokenized(gathered.finish(), np.array(truncated, bool), refused, counts)
    if tags is None:
        return done
    rows_labelled = tags.label(done.rows)
    return replace(done, rows=rows_labelled, types=list(tags.types), spans_N2=tags.counts_N2)


@contextmanager
def without_collector() -> Iterator[None]:
    """No search for cycles: none are made here, and each search walks all of torch's objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def text_span(ids: list[int]) -> list[Span]:
    """Retention rows are learned but for their first token, which nothing comes before."""
    if len(ids) < 2:
        raise Unfit("no_answer_token")
    return [(1, len(ids))]


class Batch:
    """Some rows of a split. indices: those that are encoded; rendered: how, for each, where a
    template or the like writes them."""

    def __init__(self, start: int, frame: pl.DataFrame) -> None:
        self.start, self.frame = start, frame
        self.indices: list[int] = list(range(len(frame)))
        self.rendered: list[Rendered] = []

    def encoded(self, encodings: list[Any]) -> Iterator[tuple[int, Any, Any]]:
        """Place in the frame and encoding of each row that was encoded, and what stands beside
        it: how it was rendered, the encoding of its completion, or None."""
        count = len(self.indices)
        beside: Sequence[Any] = self.rendered or encodings[count:] or [None] * count
        return zip(self.indices, encodings[:count], beside, strict=True)

    def marked(self, index: int) -> tuple[str, list[RowSpan]]:
        """The text of a row and its spans."""
        texts, spans = self._columns
        return texts[index], [(span["start"], span["end"], span["label"]) for span in spans[index]]

    @cached_property
    def _columns(self) -> tuple[list[str], list[list[dict[str, Any]]]]:
        return self.frame["text"].to_list(), self.frame["spans"].to_list()

    def render(self, kind: Kind, text: TextRules, refused: dict[int, str]) -> list[str]:
        """The texts to encode; rows that cannot be rendered are left out. Of pairs all prompts,
        then all completions."""
        if text.render is None:
            return (
                self.pairs(text, refused) if kind == "completion" else self.frame["text"].to_list()
            )
        self.indices = []
        for index, (roles, contents, forged) in enumerate(conversations(self.frame, kind, text)):
            if forged:
                refused[self.start + index] = "control_token"
                continue
            try:
                self.rendered.append(text.render(roles, contents))
                self.indices.append(index)
            except TemplateRefused as refusal:
                refused[self.start + index] = f"template_refused:{refusal.args[0]}"
        return [rendered.text for rendered in self.rendered]

    def pairs(self, text: TextRules, refused: dict[int, str]) -> list[str]:
        """All prompts, then all completions. One that spells a stop would end there."""
        forged = spells(self.frame["completion"], text.stop_words).to_numpy()
        for index in np.flatnonzero(forged).tolist():
            refused[self.start + index] = "control_token"
        self.indices = np.flatnonzero(~forged).tolist()
        kept = self.frame[self.indices]
        return [*kept["prompt"].to_list(), *kept["completion"].to_list()]


def conversations(
    frame: pl.DataFrame, kind: Kind, text: TextRules
) -> Iterator[tuple[tuple[str, ...], list[str], bool]]:
    """Each row as roles, contents, and whether a content spells a token that is not its to say."""
    if kind == "completion":
        forged = spells(frame["completion"], text.stop_words)
        forged |= spells(frame["prompt"], text.control_words)
        roles = ("user", "assistant")
        prompts, completions = frame["prompt"].to_list(), frame["completion"].to_list()
        for prompt, completion, bad in zip(prompts, completions, forged.to_list(), strict=True):
            yield roles, [prompt, completion], bad
        return
    messages = frame["messages"].explode()
    contents = messages.struct.field("content")
    words = messages.struct.field("role").to_list()
    forged = spells(contents, text.control_words)
    bad = forged.to_list() if forged.any() else None
    values = contents.to_list()
    start = 0
    for count in frame["messages"].list.len().to_list():
        stop = start + count
        yield tuple(words[start:stop]), values[start:stop], bad is not None and any(bad[start:stop])
        start = stop


def spells(texts: pl.Series, words: list[str]) -> pl.Series:
    """Whether each text holds one of some words."""
    if not words:
        return pl.Series([False]).new_from_index(0, len(texts))
    return texts.str.contains_any(words)


def encoded(
    encode: Callable[..., list[Any]],
    batches: Iterable[tuple[list[str], Batch]],
    *,
    add_special: bool,
) -> Iterator[tuple[list[Any], Batch]]:
    """Encode batches of texts, `AHEAD` of them ahead of their use."""
    waiting: deque[tuple[Future[list[Any]], Batch]] = deque()
    with ThreadPoolExecutor(AHEAD) as threads:
        for texts, batch in batches:
            coming = threads.submit(encode, texts, add_special_tokens=add_special)
            waiting.append((coming, batch))
            if len(waiting) > AHEAD:
                ready, batch = waiting.popleft()
                yield ready.result(), batch
        for ready, batch in waiting:
            yield ready.result(), batch


class Gathered:
    """Rows of tokens, end to end."""

    def __init__(self, *, causal: bool) -> None:
        self._causal = causal
        self._ids: list[NDArray[np.int32]] = []
        self._masks: list[NDArray[np.uint8]] = []
        self._lines: list[NDArray[np.int64]] = []
        self._lengths: list[int] = []
        self._answer_starts: list[int] = []

    def add(self, rows: list[list[int]], spans: list[list[Span]], lines: NDArray[np.int64]) -> None:
        """Add rows; spans: what is learned of each; lines: where each came from."""
        lengths = [len(row) for row in rows]
        total = sum(lengths)
        self._ids.append(np.fromiter(chain.from_iterable(rows), np.int32, count=total))
        self._lines.append(lines)
        self._lengths += lengths
        if not self._causal:
            return
        starts, ends = list[int](), list[int]()
        offset = 0
        for length, learned in zip(lengths, spans, strict=True):
            for start, end in learned:
                starts.append(offset + start)
                ends.append(offset + end)
            self._answer_starts.append(learned[-1][0])
            offset += length
        edges = np.zeros(total + 1, np.int8)
        edges[starts] += 1
        edges[ends] -= 1
        self._masks.append(np.cumsum(edges[:-1], dtype=np.int8).view(np.uint8))

    def finish(self) -> TokenRows:
        return TokenRows(
            input_ids=joined(self._ids, np.int32),
            offsets=np.cumsum([0, *self._lengths], dtype=np.int64),
            source_rows=joined(self._lines, np.int64),
            loss_mask=joined(self._masks, np.uint8) if self._causal else None,
            answer_start=np.array(self._answer_starts, np.int64) if self._causal else None,
        )


def joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)
