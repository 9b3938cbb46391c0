"""What can be known before the first step, from two rows: the fast path is right, and it fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from schemas.errors import StageError, UserError
from schemas.tasks import is_encoder_decoder, is_packable
from tasks.core.tokens import TokenRows
from tasks.train.batching import Layout, collate_packed
from tasks.train.loss import hidden_states, loss_sum
from tasks.train.pairs import batch_of

#: Rows are cut to this for a probe.
PROBE_TOKENS = 64


def probe_rows(rows: TokenRows) -> TokenRows:
    """Two short rows of the real ones, of different lengths, every token learned; two images."""
    if rows.pixels is not None:
        first = rows.take(np.arange(len(rows)) < 2)
        return replace(first, labels=np.zeros(len(first), dtype=np.int64))
    order = np.argsort(rows.lengths, kind="stable")
    chosen = [rows.row(int(i))[:PROBE_TOKENS] for i in (order[0], order[len(order) // 2])]
    chosen = [np.resize(row, max(2, len(row))) for row in chosen]
    ids = np.concatenate(chosen).astype(np.int32)
    return TokenRows(
        input_ids=ids,
        offsets=np.cumsum([0, *(len(row) for row in chosen)]),
        source_rows=np.arange(2),
        loss_mask=np.ones(len(ids), dtype=np.uint8),
        # Of pairs, source and target are halves.
        answer_start=np.array([len(row) // 2 for row in chosen]),
        labels=np.zeros(2, dtype=np.int64),
        token_labels=None if rows.token_labels is None else np.zeros(len(ids), dtype=np.int32),
    )


@torch.no_grad()
def own_loss(model: nn.Module, rows: TokenRows, task: str, device: torch.device) -> float:
    """The summed loss as the model itself computes it: one row at a time, from its own logits."""
    total = 0.0
    for index in range(len(rows)):
        ids = torch.from_numpy(rows.row(index).astype(np.int64))[None].to(device)
        if is_encoder_decoder(task):
            total += own_pair_loss(model, rows, index, ids)
            continue
        inputs = {"input_ids": ids}
        if rows.pixels is not None:
            inputs = {"pixel_values": torch.from_numpy(rows.images(np.array([index]))).to(device)}
        logits = model(**inputs).logits.float()
        if is_packable(task):
            # PEFT gives logits of the virtual tokens of a prompt too, in front.
            own = logits[0, -ids.shape[1] : -1]
            total += float(F.cross_entropy(own, ids[0, 1:], reduction="sum"))
        else:
            logits_NC = logits.flatten(0, -2)
            first_N = torch.zeros(len(logits_NC), dtype=torch.long, device=device)
            total += float(F.cross_entropy(logits_NC, first_N, reduction="sum"))
    return total


def own_pair_loss(model: nn.Module, rows: TokenRows, index: int, ids: torch.Tensor) -> float:
    """That of a source and its target, ids [1, S + D]. The model shifts the target by itself, as
    it was pretrained to."""
    assert rows.answer_start is not None
    end = int(rows.answer_start[index])
    logits = model(input_ids=ids[:, :end], labels=ids[:, end:]).logits.float()
    return float(F.cross_entropy(logits[0], ids[0, end:], reduction="sum"))


@torch.no_grad()
def check_loss(
    model: nn.Module,
    rows: TokenRows,
    task: str,
    layout: Layout,
    expected: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Prove that what will be trained is the model's own loss.

    Some models scale or cap their logits after the head, which training by the head alone would
    get wrong in silence.

    Raises:
        UserError: the two differ by more than rounding.
    """
    index = np.arange(len(rows))
    batch = batch_of(rows, index, task, layout)
    ours = float(loss_sum(model, batch.to(device), dtype))
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-3
    if not abs(ours - expected) <= tolerance * (1 + abs(expected)):
        raise UserError.at(
            "base.model",
            f"{type(model).__name__} computes its loss in a way that training does not know "
            f"(its own {expected:.4f}, here {ours:.4f}): perhaps it scales or caps its logits",
            "choose a base whose logits are the output of its head",
        )


@torch.no_grad()
def check_packed_apart(model: nn.Module, rows: TokenRows, device: torch.device) -> None:
    """Prove that packed rows do not see each other: bit for bit, whatever stands before.

    Raises:
        StageError: the second of two packed rows changes with the first.
    """
    index = np.arange(2)
    first = int(rows.lengths[0])
    before = hidden_states(model, collate_packed(rows, index).to(device))
    changed = rows.input_ids.copy()
    changed[:first] = np.roll(changed, 1)[:first]
    other = TokenRows(changed, rows.offsets, rows.source_rows, rows.loss_mask)
    after = hidden_states(model, collate_packed(other, index).to(device))
    end = len(rows.input_ids)
    if not torch.equal(before[first:end], after[first:end]):
        raise StageError(f"packed rows see each other in {type(model).__name__}: do not train it")
