"""The fixed work for which memory and latency are measured, the same for every subject.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.tasks import is_packable
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import (
    Inputs,
    context_limit,
    is_pair_model,
    left_padded,
    right_padded,
)


def prompts(rows: TokenRows, batch_size: int, prompt_tokens: int) -> list[NDArray[np.int32]]:
    """`batch_size` prompts of `prompt_tokens` tokens each, cut from the rows laid end to end."""
    block_BT = np.resize(rows.input_ids, (batch_size, prompt_tokens))
    return list(block_BT)


def inputs(rows: TokenRows, task: str, batch_size: int, prompt_tokens: int) -> Inputs:
    """The same prompts as one unpadded batch, as the task's models take it; of images, which have
    one length, as many of the first as it takes."""
    if rows.pixels is not None:
        first = np.resize(np.arange(len(rows)), batch_size)
        return {"pixel_values": torch.from_numpy(rows.images(first))}
    block = prompts(rows, batch_size, prompt_tokens)
    return left_padded(block, 0) if is_packable(task) else right_padded(block, 0)


def prompt_length(model: torch.nn.Module, wanted: int, new_tokens: int) -> int:
    """`wanted`, or as much of it as leaves room for `new_tokens` in the model's context. What a
    decoder writes takes none of its encoder's."""
    apart = is_pair_model(model)
    limit = context_limit(model, reading=apart)
    if limit is None:
        return wanted
    return max(1, min(wanted, limit if apart else limit - new_tokens))
