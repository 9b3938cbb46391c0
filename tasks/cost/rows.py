"""The rows that a plan counts with: those that were prepared, or else full ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.recipe import Train
from schemas.tasks import TASKS, is_encoder_decoder
from tasks.core.plan import Plan, Rows
from tasks.core.schedule import total_steps
from tasks.core.tokens import TokenRows
from tasks.train.batching import (
    TOKEN_ALIGN,
    Layout,
    held_tokens,
    micro_batches,
    padded_length,
)
from tasks.train.pairs import held_lengths, longest_sides

TOKENS = Path("tokens") / "train.safetensors"
#: Steps whose micro-batches are looked at for the largest, some 40 microseconds each.
LOOKED_AT = 1000
#: Activations of a token, in scores: a layer keeps some 16 times its width, and a head of 64 has
#: one score for each token of the row.
OF_A_TOKEN = 1024


@dataclass(frozen=True)
class Load:
    """What a run has to do. steps, tokens: None where the rows are not prepared yet.

    later: the largest micro-batch that is not its step's first, and so runs beside the gradients
    of those before it; None where a step is one micro-batch.
    met: how many different shapes of micro-batches a run has met, with the largest one's share of
    `micro_batch` that runs when it has met so many. None where the rows are not prepared yet.
    """

    rows: TokenRows
    micro_batch: Rows
    later: Rows | None
    steps: int | None
    tokens: int | None
    met: dict[int, float] | None = None


@dataclass(frozen=True)
class FullRow:
    """The longest row that there may be. pixels: of an image, channels, height and width."""

    tokens: int
    pixels: tuple[int, int, int] | None = None


def load_of(prepared: Path | None, task: str, train: Train, layout: Layout, full: FullRow) -> Load:
    """The largest micro-batches and, from real rows, the steps."""
    rows = full_rows(layout.budget, full, task) if prepared is None else _read(prepared)
    plan = Plan(rows.lengths, train.batch_tokens, train.seed)
    lengths = held_lengths(rows, task)
    steps = total_steps(train, plan.steps_per_epoch)
    looked_at = [
        micro_batches(step, lengths, layout) for step in plan.epoch(0)[: min(steps, LOOKED_AT)]
    ]
    largest = _largest([part for parts in looked_at for part in parts], lengths, layout)
    if prepared is None:
        # Full rows are one micro-batch, of which a step may take several.
        again = largest if train.batch_tokens > layout.budget else None
        return Load(rows, largest, again, None, None)
    later = [part for parts in looked_at for part in parts[1:]]
    mean = len(rows.input_ids) / plan.steps_per_epoch
    second = _largest(later, lengths, layout) if later else None
    met = _met([part for parts in looked_at for part in parts], lengths, layout)
    return Load(rows, largest, second, steps, round(steps * mean), met)


def _largest(parts: list[Rows], lengths: NDArray[np.int64], layout: Layout) -> Rows:
    return max(parts, key=lambda part: kept_by(lengths[part], layout))


def _met(parts: list[Rows], lengths: NDArray[np.int64], layout: Layout) -> dict[int, float]:
    """`Load.met` of micro-batches in their order. Those of the same number of tokens, filled up as
    they are, count as one shape."""
    kept = [kept_by(lengths[part], layout) for part in parts]
    shapes: set[int] = set()
    met: dict[int, float] = {}
    for part, own in zip(parts, kept, strict=True):
        shapes.add(-(-held_tokens(lengths[part], layout) // TOKEN_ALIGN))
        met[len(shapes)] = max(met.get(len(shapes), 0.0), own / max(kept))
    return met


def kept_by(lengths: NDArray[np.int64], layout: Layout) -> int:
    """What rows make a pass keep, in a measure of its own: so much a token of every layer's
    activations, and its scores, which grow with the row. Padding is kept as tokens are, where it
    goes through the layers: many short rows may be more than a few long ones.

    lengths: as `held_lengths` has them.
    """
    whole = lengths + (layout.virtual if lengths.ndim == 1 else [layout.virtual, 0])
    if not (layout.packed or layout.unpadded):
        longest = whole.max(axis=0, keepdims=True)
        whole = np.broadcast_to(np.vectorize(padded_length)(longest), whole.shape)
    return int((whole * (OF_A_TOKEN + whole)).sum())


def longest_of(prepared: Path | None, max_length: int) -> int:
    """Tokens of the longest row."""
    return max_length if prepared is None else int(_read(prepared).lengths.max())


def sides_of(prepared: Path | None, task: str, max_length: int) -> list[int]:
    """Tokens of the longest row, or of the longest source and of the longest target."""
    if prepared is None:
        return [max_length] * (1 + is_encoder_decoder(task))
    return longest_sides(_read(prepared), task)


def mean_of(prepared: Path | None, max_length: int) -> float:
    """Tokens of a row on average."""
    return max_length if prepared is None else float(_read(prepared).lengths.mean())


def full_rows(tokens: int, full: FullRow, task: str) -> TokenRows:
    """As many such rows as one forward pass may have, every token learned; of pairs rows of two
    sides of that length, of which the second is learned."""
    pairs = is_encoder_decoder(task)
    length = full.tokens if full.pixels else min(full.tokens * (1 + pairs), tokens)
    count = max(1, tokens // length)
    place = np.arange(count * length) % length
    zeros = np.zeros(count * length, dtype=np.int32)
    return TokenRows(
        input_ids=zeros,
        offsets=np.arange(count + 1) * length,
        source_rows=np.arange(count),
        loss_mask=(place >= length // 2 if pairs else place >= 0).astype(np.uint8),
        answer_start=np.full(count, length // 2),
        labels=np.zeros(count, dtype=np.int64),
        token_labels=zeros if TASKS[task].labels == "token" else None,
        values=np.zeros((full.pixels[0], 256), np.float32) if full.pixels else None,
        pixels=np.zeros((count, *full.pixels), np.uint8) if full.pixels else None,
    )


@lru_cache(maxsize=1)
def _read(prepared: Path) -> TokenRows:
    return TokenRows.load(prepared / TOKENS)
