"""Which rows make which optimiser step, and how the rows of a step become tensors.

A plan is a pure function of (seed, epoch): the data position of a run is its step number.
Within a step rows are sorted by length, so that micro-batches hold little padding; the rows of
a step do not depend on how it is cut into micro-batches.

Shapes: B rows, L the longest of them, N answer tokens (or rows, for classification).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import UserError
from tasks.core.tokens import TokenRows

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    input_ids_BL: right-padded, or one packed row [1, T].
    attention_mask_BL: None where no real token can see padding (causal models).
    position_ids_BL: set for packed rows, each of which starts at 0.
    predict_N: for a causal task, positions in the flattened [B * L] whose next token is learned.
    targets_N: those next tokens; the labels for classification.
    tokens: real tokens, padding excluded.
    """

    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor | None
    position_ids_BL: torch.Tensor | None
    predict_N: torch.Tensor | None
    targets_N: torch.Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            self.input_ids_BL.to(device, non_blocking=True),
            move(self.attention_mask_BL),
            move(self.position_ids_BL),
            move(self.predict_N),
            self.targets_N.to(device, non_blocking=True),
            self.tokens,
        )


@dataclass(frozen=True)
class Plan:
    """The rows of every step of every epoch.

    lengths: tokens of each row, [rows].
    batch_tokens: tokens that a step should have; an epoch is cut into equal shares of about
        that many, so that it has no small last step.
    """

    lengths: NDArray[np.int64]
    batch_tokens: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        steps = round(int(self.lengths.sum()) / self.batch_tokens)
        return min(max(steps, 1), len(self.lengths))

    def epoch(self, epoch: int) -> list[Rows]:
        """The row numbers of each step of one epoch; every row is in exactly one step."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        steps = self.steps_per_epoch
        ends = np.cumsum(self.lengths[order])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, steps) / steps)
        # A row longer than a step's share would leave the next step empty: give each one row.
        number = np.arange(1, steps)
        cuts = np.maximum.accumulate(np.maximum(cuts, 1) - number) + number
        cuts = np.minimum(cuts, len(order) - steps + number)
        return [np.asarray(part, dtype=np.int64) for part in np.split(order, cuts)]


def micro_batches(rows: Rows, lengths: NDArray[np.int64], padded_tokens: int) -> list[Rows]:
    """The rows of a step, longest first, in groups of at most `padded_tokens` with padding.

    A row longer than that is a group of its own. Longest first, so that memory peaks at once.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    groups = []
    start = 0
    while start < len(ordered):
        count = max(1, padded_tokens // int(lengths[ordered[start]]))
        groups.append(ordered[start : start + count])
        start += count
    return groups


def collate(rows: TokenRows, index: Rows, task: str, pad_id: int) -> Batch:
    """Right-padded tensors of some rows, made by indexing, with no loop over them."""
    length_B = rows.lengths[index]
    column_L = np.arange(int(length_B.max()))
    real_BL = column_L < length_B[:, None]
    flat_BL = np.where(real_BL, rows.offsets[index][:, None] + column_L, 0)
    input_ids_BL = np.where(real_BL, rows.input_ids[flat_BL], pad_id).astype(np.int64)
    tokens = int(length_B.sum())
    if task != "causal-lm":
        assert rows.labels is not None
        return Batch(
            torch.from_numpy(input_ids_BL),
            None if real_BL.all() else torch.from_numpy(real_BL.astype(np.int64)),
            None,
            None,
            torch.from_numpy(rows.labels[index]),
            tokens,
        )
    assert rows.loss_mask is not None
    learned_BL = real_BL & (rows.loss_mask[flat_BL] != 0)
    predict_N, targets_N = _next_tokens(input_ids_BL, learned_BL)
    return Batch(torch.from_numpy(input_ids_BL), None, None, predict_N, targets_N, tokens)


def collate_packed(rows: TokenRows, index: Rows) -> Batch:
    """Causal rows end to end in one row [1, T] with no padding.

    Each row's positions start at 0. From that the model's attention mask keeps rows apart
    (transformers' packed-sequence detection: batch of one, no attention mask).
    """
    assert rows.loss_mask is not None
    length_B = rows.lengths[index]
    starts_B = np.cumsum(length_B) - length_B
    position_T = np.arange(int(length_B.sum())) - np.repeat(starts_B, length_B)
    flat_T = np.repeat(rows.offsets[index], length_B) + position_T
    ids_1T = rows.input_ids[flat_T].astype(np.int64)[None]
    # The first token of a row is nobody's next token, even if the mask says so.
    learned_1T = ((rows.loss_mask[flat_T] != 0) & (position_T > 0))[None]
    predict_N, targets_N = _next_tokens(ids_1T, learned_1T)
    return Batch(
        torch.from_numpy(ids_1T),
        None,
        torch.from_numpy(position_T[None]),
        predict_N,
        targets_N,
        int(length_B.sum()),
    )


def answer_tokens(rows: TokenRows, task: str) -> NDArray[np.int64]:
    """What the loss is averaged over: learned tokens of each row, or 1 a row, [rows].

    Raises:
        UserError: rows that teach nothing. Prepare refuses them, so the file was made elsewhere.
    """
    if task != "causal-lm":
        return np.ones(len(rows), dtype=np.int64)
    assert rows.loss_mask is not None
    learned = rows.loss_mask.astype(np.int64)
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
