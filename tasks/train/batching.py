"""How the rows of an optimiser step become micro-batches and tensors.

Within a step rows are sorted by length, so that micro-batches hold little padding; the rows of
a step do not depend on how it is cut into micro-batches.

Shapes: B rows, L the longest of them, N answer tokens (or rows, for classification).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.tasks import TASKS, is_packable
from tasks.core.entities import IGNORED
from tasks.core.plan import Rows, equal_shares
from tasks.core.tokens import TokenRows

#: Batches are filled up to multiples of these, so that products have few different shapes:
#: oneDNN compiles, and keeps about 1 MB of code, for every new one.
TOKEN_ALIGN = 64
ROW_ALIGN = 4
LENGTH_ALIGN = 8


@dataclass(frozen=True)
class Layout:
    """How the rows of a step become micro-batches.

    budget: padded tokens of one.
    packed: rows end to end (causal models), or one below the other with padding.
    unpadded: the padding is only there for the embeddings (`tasks/train/unpad.py`).
    pad_id: what fills.
    virtual: tokens of a soft prompt that every layer has in front of each row, of pairs each
        source; 0 where they are keys and values that all rows share.
    start_id: what a decoder beside an encoder begins with.
    """

    budget: int
    packed: bool
    pad_id: int = 0
    unpadded: bool = False
    virtual: int = 0
    start_id: int = 0


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    input_ids_BL: right-padded rows, or packed ones in a single row [1, T]; of pairs the sources.
    tokens: real tokens, padding excluded.
    predict_N: where answers are generated, positions in the flattened [B * L], of pairs [B * D],
        whose next token is learned.
    targets_N: those next tokens; for classification the label of each row, or of each position.
    attention_mask_BL: None where no real token can see padding.
    position_ids_BL: of packed rows, each of which starts at 0.
    row_ends: [rows + 1], from 0: where packed rows begin and end.
    pixel_values_BCHW: of images, in place of ids, which say no more than how many tokens there are.
    decoder_input_ids_BD: of pairs what the decoder reads (`tasks/train/pairs.py`).
    """

    input_ids_BL: torch.Tensor
    tokens: int
    predict_N: torch.Tensor | None = None
    targets_N: torch.Tensor | None = None
    attention_mask_BL: torch.Tensor | None = None
    position_ids_BL: torch.Tensor | None = None
    row_ends: torch.Tensor | None = None
    pixel_values_BCHW: torch.Tensor | None = None
    decoder_input_ids_BD: torch.Tensor | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """What a classifier is called with, or an encoder."""
        if self.pixel_values_BCHW is not None:
            return {"pixel_values": self.pixel_values_BCHW}
        return {"input_ids": self.input_ids_BL, "attention_mask": self.attention_mask_BL}

    @property
    def positions(self) -> int:
        """Tokens and padding that the forward pass goes over."""
        decoded = self.decoder_input_ids_BD
        return self.input_ids_BL.numel() + (0 if decoded is None else decoded.numel())

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


def micro_batches(rows: Rows, lengths: NDArray[np.int64], layout: Layout) -> list[Rows]:
    """The rows of one step in as few parts as the layout's budget allows, each row once.

    No part is larger than the budget, but for a single row that is.

    lengths: [rows], or [rows, 2] of sources and targets, which are padded apart.
    """
    lengths = lengths + (layout.virtual if lengths.ndim == 1 else [layout.virtual, 0])
    whole = lengths.reshape(len(lengths), -1).sum(axis=1)
    ordered = rows[np.argsort(-whole[rows], kind="stable")]
    cut = _packs if layout.packed else equal_shares
    count = min(-(-int(whole[ordered].sum()) // layout.budget), len(ordered))
    while True:
        parts = cut(ordered, whole, count)
        if (
            count == len(ordered)
            or max(held_tokens(lengths[part], layout) for part in parts) <= layout.budget
        ):
            return parts
        count += 1


def held_tokens(lengths: NDArray[np.int64], layout: Layout) -> int:
    """The tokens that a forward pass over rows of these lengths holds, and the budget bounds."""
    size = _packed_size if layout.packed else _padded_size
    if layout.unpadded:
        size = _unpadded_size
    return size(lengths)


def _packs(ordered: Rows, lengths: NDArray[np.int64], count: int) -> list[Rows]:
    """Rows dealt to equal packs: long ones with short ones."""
    pack = _snake(np.arange(len(ordered)), count)
    return [ordered[pack == number] for number in range(count)]


def _packed_size(lengths: NDArray[np.int64]) -> int:
    return int(lengths.sum())


def _padded_size(lengths: NDArray[np.int64]) -> int:
    return int(lengths.max(axis=0).sum()) * len(lengths)


def _unpadded_size(lengths: NDArray[np.int64]) -> int:
    """Padding costs what embeddings do: an eighth at most of what a few layers keep of a token."""
    return max(_packed_size(lengths), _padded_size(lengths) // 8)


def _snake(number: Any, count: int) -> Any:
    """0 1 2 2 1 0 0 1 2 …: what sorted things are dealt by, so that the piles are equal."""
    turn, place = np.divmod(number, count)
    return np.where(turn % 2 == 0, place, count - 1 - place)


def padded_length(length: int) -> int:
    align = LENGTH_ALIGN if length <= 64 else 4 * LENGTH_ALIGN
    return -(-length // align) * align


def collate(rows: TokenRows, index: Rows, task: str, pad_id: int) -> Batch:
    """Right-padded tensors of some rows, made by indexing, with no loop over them.

    For classification the batch is filled up to a multiple of `ROW_ALIGN` rows with ones that
    do not count.
    """
    if rows.pixels is not None:
        return collate_images(rows, index)
    length_B = rows.lengths[index]
    column_L = np.arange(padded_length(int(length_B.max())))
    real_BL = column_L < length_B[:, None]
    flat_BL = np.where(real_BL, rows.offsets[index][:, None] + column_L, 0)
    input_ids_BL = np.where(real_BL, rows.input_ids[flat_BL], pad_id).astype(np.int64)
    tokens = int(length_B.sum())
    if is_packable(task):
        assert rows.loss_mask is not None
        # Causal attention never looks right, where the padding is: no mask.
        learned_BL = real_BL & (rows.loss_mask[flat_BL] != 0)
        return Batch(
            torch.from_numpy(input_ids_BL), tokens, *_next_tokens(input_ids_BL, learned_BL)
        )
    fill = -len(index) % ROW_ALIGN if len(index) > ROW_ALIGN else 0
    input_ids_BL = np.pad(input_ids_BL, ((0, fill), (0, 0)), constant_values=pad_id)
    targets = _labels(rows, index, flat_BL, real_BL)
    targets = np.pad(targets, ((0, fill), (0, 0)), constant_values=IGNORED)
    real_BL = np.pad(real_BL, ((0, fill), (0, 0)))
    real_BL[:, 0] = True
    return Batch(
        torch.from_numpy(input_ids_BL),
        tokens,
        targets_N=torch.from_numpy(targets.reshape(-1)),
        attention_mask_BL=None if real_BL.all() else torch.from_numpy(real_BL.astype(np.int64)),
    )


def collate_images(rows: TokenRows, index: Rows) -> Batch:
    """Images and their labels, filled up to a multiple of `ROW_ALIGN` with black ones that do not
    count. There is no padding: each has the same tokens."""
    assert rows.labels is not None
    fill = -len(index) % ROW_ALIGN if len(index) > ROW_ALIGN else 0
    pixel_values_BCHW = np.pad(rows.images(index), ((0, fill), (0, 0), (0, 0), (0, 0)))
    tokens = int(rows.lengths[index].sum())
    return Batch(
        torch.zeros(len(index) + fill, tokens // len(index), dtype=torch.int64),
        tokens,
        targets_N=torch.from_numpy(np.pad(rows.labels[index], (0, fill), constant_values=IGNORED)),
        pixel_values_BCHW=torch.from_numpy(pixel_values_BCHW),
    )


def _labels(
    rows: TokenRows, index: Rows, flat_BL: NDArray[np.int64], real_BL: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """What is learned of some rows: [B, 1], or [B, L] where every token has a label."""
    if rows.token_labels is not None:
        return np.where(real_BL, rows.token_labels[flat_BL], IGNORED).astype(np.int64)
    assert rows.labels is not None
    return rows.labels[index][:, None]


def collate_packed(rows: TokenRows, index: Rows, pad_id: int = 0) -> Batch:
    """Causal rows end to end in one row [1, T], filled up to a multiple of `TOKEN_ALIGN`.

    Each row's positions start at 0, and `row_ends` says where it is. The fill is a row of its
    own of which nothing is learned.
    """
    assert rows.loss_mask is not None
    length_B = rows.lengths[index]
    tokens = int(length_B.sum())
    fill = -tokens % TOKEN_ALIGN
    ends = np.concatenate([[0], np.cumsum(length_B), [tokens + fill] if fill else []])
    position_T = np.arange(tokens + fill) - np.repeat(ends[:-1], np.diff(ends).astype(np.int64))
    flat_T = np.repeat(rows.offsets[index], length_B) + position_T[:tokens].astype(np.int64)
    ids_T = np.full(tokens + fill, pad_id, dtype=np.int64)
    ids_T[:tokens] = rows.input_ids[flat_T]
    learned_T = np.zeros(tokens + fill, dtype=bool)
    # The first token of a row is nobody's next token, even if the mask says so.
    learned_T[:tokens] = (rows.loss_mask[flat_T] != 0) & (position_T[:tokens] > 0)
    return Batch(
        torch.from_numpy(ids_T[None]),
        tokens,
        *_next_tokens(ids_T[None], learned_T[None]),
        position_ids_BL=torch.from_numpy(position_T[None].astype(np.int64)),
        row_ends=torch.from_numpy(ends.astype(np.int32)),
    )


def answer_tokens(rows: TokenRows, task: str) -> NDArray[np.int64]:
    """What the loss is averaged over: learned tokens of each row, or 1 a labelled row, [rows].

    Raises:
        UserError: rows that teach nothing. Prepare refuses them, so the file was made elsewhere.
    """
    if TASKS[task].labels == "row":
        return np.ones(len(rows), dtype=np.int64)
    if rows.token_labels is not None:
        learned = (rows.token_labels != IGNORED).astype(np.int64)
    else:
        assert rows.loss_mask is not None
        learned = rows.loss_mask.astype(np.int64)
        # What a row begins with follows on nothing. (The target of a pair is behind its source.)
        learned[rows.offsets[:-1]] = 0
    counts = np.add.reduceat(learned, rows.offsets[:-1])
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise UserError.at(
            f"train row {int(rows.source_rows[empty[0]])}",
            f"no token to learn ({len(empty)} such rows)",
            "raise data.max_length or remove the rows: their answers are empty or cut off",
        )
    return counts


def _next_tokens(
    input_ids_BL: NDArray[np.int64], learned_BL: NDArray[np.bool_]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions that predict a learned token, and that token."""
    learned_BL[:, 0] = False
    learned = np.flatnonzero(learned_BL)
    return torch.from_numpy(learned - 1), torch.from_numpy(input_ids_BL.reshape(-1)[learned])
