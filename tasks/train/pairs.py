"""Rows of an encoder-decoder as tensors: sources and targets, each padded by itself.

A row is a source of S tokens and a target of D tokens (`tasks/core/tokens.py`). The decoder reads
the target one place to the right, behind its start token, so that at each place the next token is
the one to learn. Padding is behind what is real on both sides: the encoder's mask hides it from the
encoder and from cross-attention, and the decoder is causal.

Shapes: B rows, S the longest source, D the longest target, N target tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.tasks import is_encoder_decoder
from tasks.core.plan import Rows
from tasks.core.tokens import TokenRows
from tasks.train.batching import (
    Batch,
    Layout,
    collate,
    collate_packed,
    padded_length,
)


def batch_of(rows: TokenRows, index: Rows, task: str, layout: Layout) -> Batch:
    """Some rows as one forward pass takes them, whatever the task."""
    if layout.packed:
        return collate_packed(rows, index, layout.pad_id)
    if is_encoder_decoder(task):
        return collate_pairs(rows, index, layout.pad_id, layout.start_id)
    return collate(rows, index, task, layout.pad_id)


def held_lengths(rows: TokenRows, task: str) -> NDArray[np.int64]:
    """What a micro-batch's size depends on: tokens of each row, [rows], or of each source and
    target, [rows, 2], which are padded apart."""
    if not is_encoder_decoder(task):
        return rows.lengths
    assert rows.answer_start is not None
    return np.stack([rows.answer_start, rows.lengths - rows.answer_start], axis=1)


def longest_sides(rows: TokenRows, task: str) -> list[int]:
    """Tokens of the longest row; of pairs, of the longest source and of the longest target."""
    return np.atleast_1d(held_lengths(rows, task).max(axis=0)).tolist()  # type: ignore[no-any-return]


def collate_pairs(rows: TokenRows, index: Rows, pad_id: int, start_id: int) -> Batch:
    """Right-padded sources and, behind `start_id`, targets without their last token.

    Of the mask, which is of whole rows, only that of the targets counts.
    """
    assert rows.answer_start is not None
    assert rows.loss_mask is not None
    begin_B, source_B = rows.offsets[index], rows.answer_start[index]
    target_B = rows.lengths[index] - source_B
    source_BS, real_BS = _padded(rows.input_ids, begin_B, source_B, pad_id)
    target_BD, real_BD = _padded(rows.input_ids, begin_B + source_B, target_B, pad_id)
    learned_BD, _ = _padded(rows.loss_mask, begin_B + source_B, target_B, 0)
    shifted_BD = np.roll(target_BD, 1, axis=1)
    # What stands behind a row's end is nobody's next token: padding too.
    shifted_BD[:, 1:][~real_BD[:, 1:]] = pad_id
    shifted_BD[:, 0] = start_id
    learned = np.flatnonzero(real_BD & (learned_BD != 0))
    return Batch(
        torch.from_numpy(source_BS),
        int(source_B.sum() + target_B.sum()),
        predict_N=torch.from_numpy(learned),
        targets_N=torch.from_numpy(target_BD.reshape(-1)[learned]),
        attention_mask_BL=None if real_BS.all() else torch.from_numpy(real_BS.astype(np.int64)),
        decoder_input_ids_BD=torch.from_numpy(shifted_BD),
    )


def _padded(
    values: NDArray[np.generic], begin_B: Rows, length_B: Rows, fill: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Stretches of a flat array, one below the other, and where they are no fill."""
    column_L = np.arange(padded_length(int(length_B.max())))
    real_BL = column_L < length_B[:, None]
    flat_BL = np.where(real_BL, begin_B[:, None] + column_L, 0)
    return np.where(real_BL, values[flat_BL], fill).astype(np.int64), real_BL
