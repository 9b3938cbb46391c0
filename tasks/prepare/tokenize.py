"""The rows of one split as tokens.

The tokenizer encodes whole batches on all cores with Python's lock released, in a thread, while
this process renders the next batch and gathers the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.rows import Kind
from tasks.core.progress import bar
from tasks.core.tokens import TokenRows
from tasks.prepare.render import Rendered, TemplateRefused
from tasks.prepare.spans import Counts, Rules, Span, Unfit, causal_row, cut_text

#: Rows that are encoded at a time: enough for all cores, few enough to stay in their caches.
BATCH_ROWS = 2048

Renderer = Callable[..., Rendered]


@dataclass(frozen=True)
class Tokenized:
    """The token rows of a split (without labels), and what became of each row given.

    refused: place of the row among those given, its reason.
    """

    rows: TokenRows
    refused: dict[int, str]
    counts: Counts


def tokenize_split(
    frames: Iterable[pl.DataFrame],
    total: int,
    kind: Kind,
    tokenizer: Any,
    rules: Rules,
    *,
    label: str,
    render: Renderer | None = None,
) -> Tokenized:
    """Tokenise the rows of a split, which come as frames of BATCH_ROWS or fewer.

    tokenizer: a `tokenizers.Tokenizer`. render: for chat and completion rows. label: of the bar.
    """
    counts, refused = Counts(), dict[int, str]()
    gathered = Gathered(causal=kind != "label")

    def texts() -> Iterator[tuple[list[str], Batch]]:
        start = 0
        for frame in frames:
            batch = Batch(start, frame)
            yield batch.render(kind, render, refused), batch
            start += len(frame)

    with bar(label, total, "rows") as progress:
        for encodings, batch in encoded(tokenizer, texts(), add_special=rules.add_special):
            rows, spans, good = [], [], []
            for place, index in enumerate(batch.indices):
                try:
                    if kind in ("chat", "completion"):
                        ids, learned = causal_row(
                            encodings[place], batch.rendered[place], rules, counts
                        )
                    else:
                        ids = cut_text(encodings[place].ids, rules, counts)
                        learned = text_span(ids) if kind == "text" else []
                except Unfit as unfit:
                    refused[batch.start + index] = str(unfit.args[0])
                    continue
                rows.append(ids)
                spans.append(learned)
                good.append(index)
            gathered.add(rows, spans, batch.frame["row"].to_numpy()[good])
            progress.advance(len(batch.frame))
    return Tokenized(gathered.finish(), refused, counts)


def text_span(ids: list[int]) -> list[Span]:
    """Retention rows are learned but for their first token, which nothing comes before."""
    if len(ids) < 2:
        raise Unfit("no_answer_token")
    return [(1, len(ids))]


class Batch:
    """Some rows of a split. indices: those that could be rendered; rendered: how, for each."""

    def __init__(self, start: int, frame: pl.DataFrame) -> None:
        self.start, self.frame = start, frame
        self.indices: list[int] = list(range(len(frame)))
        self.rendered: list[Rendered] = []

    def render(self, kind: Kind, render: Renderer | None, refused: dict[int, str]) -> list[str]:
        """The texts to encode; rows that the template refuses are left out."""
        if kind in ("label", "text"):
            return self.frame["text"].to_list()
        assert render is not None
        rows: Iterable[tuple[Any, ...]]
        if kind == "chat":
            rows = ((messages,) for messages in self.frame["messages"].to_list())
        else:
            rows = zip(self.frame["prompt"].to_list(), self.frame["completion"].to_list())
        self.indices = []
        for index, row in enumerate(rows):
            try:
                self.rendered.append(render(*row))
                self.indices.append(index)
            except TemplateRefused as refusal:
                refused[self.start + index] = f"template_refused:{refusal.args[0]}"
        return [rendered.text for rendered in self.rendered]


def encoded(
    tokenizer: Any, batches: Iterable[tuple[list[str], Batch]], *, add_special: bool
) -> Iterator[tuple[list[Any], Batch]]:
    """Encode batches of texts, one of them ahead of its use."""
    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for texts, batch in batches:
            coming = thread.submit(tokenizer.encode_batch, texts, add_special_tokens=add_special)
            if waiting is not None:
                yield waiting[0].result(), waiting[1]
            waiting = coming, batch
        if waiting is not None:
            yield waiting[0].result(), waiting[1]


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
        edges = np.zeros(total + 1, np.int8)
        offset = 0
        for length, learned in zip(lengths, spans, strict=True):
            for start, end in learned:
                edges[offset + start] += 1
                edges[offset + end] -= 1
            self._answer_starts.append(learned[-1][0])
            offset += length
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


def take(rows: TokenRows, chosen: NDArray[np.bool_]) -> TokenRows:
    """The rows of a mask."""
    tokens = np.repeat(chosen, rows.lengths)
    return TokenRows(
        input_ids=rows.input_ids[tokens],
        offsets=np.concatenate([[0], np.cumsum(rows.lengths[chosen])]).astype(np.int64),
        source_rows=rows.source_rows[chosen],
        loss_mask=None if rows.loss_mask is None else rows.loss_mask[tokens],
        answer_start=None if rows.answer_start is None else rows.answer_start[chosen],
    )
