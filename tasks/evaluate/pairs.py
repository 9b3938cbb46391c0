"""Batches for an encoder-decoder: sources and targets, each padded on the right by itself.

Shapes: B rows, S positions of the longest source, D of the longest target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from tasks.core.entities import IGNORED
from tasks.core.models import decoder_start
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import (
    Inputs,
    Row,
    base_of,
    classified,
    is_pair_model,
    pad_id_of,
    right_padded,
    run_on,
)


def start_id_of(model: torch.nn.Module) -> int:
    """The token that the decoder begins with."""
    return decoder_start(base_of(model).config)


def sides(rows: TokenRows, index: int) -> tuple[Row, Row]:
    """The source and the target of a row."""
    assert rows.answer_start is not None
    row, end = rows.row(index), int(rows.answer_start[index])
    return row[:end], row[end:]


def pair_inputs(
    sources: Sequence[Row], targets: Sequence[Row], pad_id: int, start_id: int
) -> Inputs:
    """input_ids and attention_mask, int64 [B, S]; decoder_input_ids, [B, D]: the targets one place
    to the right behind `start_id`. No mask of these: a decoder never sees the padding behind."""
    behind = [np.concatenate([[start_id], target[:-1]]) for target in targets]
    decoded = right_padded(behind, pad_id)["input_ids"]
    return {**right_padded(sources, pad_id), "decoder_input_ids": decoded}


def padded_targets(targets: Sequence[Row]) -> torch.Tensor:
    """What each place of the decoder is to say, int64 [B, D]; IGNORED behind a target's end."""
    return right_padded(targets, IGNORED)["input_ids"]


def first_rows(model: torch.nn.Module, rows: TokenRows, count: int) -> Inputs:
    """The first rows of a split as one batch of whatever model."""
    few = range(min(len(rows), count))
    if not is_pair_model(model):
        return classified(rows, few, model)
    sources, targets = zip(*(sides(rows, index) for index in few), strict=True)
    return pair_inputs(sources, targets, pad_id_of(model), start_id_of(model))


def pair_losses(
    model: torch.nn.Module, rows: TokenRows, group: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy of each target, float64 [B], and its tokens, [B]."""
    sources, targets = zip(*(sides(rows, index) for index in group), strict=True)
    inputs = pair_inputs(sources, targets, pad_id_of(model), start_id_of(model))
    logits_BDV = run_on(model, inputs, use_cache=False).logits
    target_BD = padded_targets(targets).to(logits_BDV.device)
    loss_BD = cross_entropy(
        logits_BDV.float().transpose(1, 2), target_BD, reduction="none", ignore_index=IGNORED
    )
    return loss_BD.double().sum(1), (target_BD != IGNORED).sum(1)
