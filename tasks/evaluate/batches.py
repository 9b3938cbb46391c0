"""Rows into padded batches: grouped by length, bounded by what a forward pass may hold.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.core.tokens import TokenRows
from tasks.methods import soft

#: Padded tokens in one forward pass: enough for full matrix units, and activations that stay in
#: a CPU's caches (8,192 were seen to cost 40 % more a token).
BATCH_TOKENS = 2048
BATCH_ROWS = 256

Inputs = dict[str, torch.Tensor]
Row = NDArray[np.int32]


def by_length(
    lengths: NDArray[np.int64], max_tokens: int = BATCH_TOKENS, max_rows: int = BATCH_ROWS
) -> list[NDArray[np.int64]]:
    """Every row index once, in groups of similar length, the longest first.

    A group's rows times its longest length is at most `max_tokens`, but for single rows that
    are longer than that by themselves.
    """
    order = np.argsort(-lengths, kind="stable")
    groups: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        size = min(max_rows, max(1, max_tokens // longest))
        groups.append(order[start : start + size])
        start += size
    return groups


def left_padded(rows: Sequence[Row], pad_id: int) -> Inputs:
    """input_ids, attention_mask, position_ids, each int64 [B, T]; every row ends at column T.

    So what follows the rows, an answer to be scored or generated, stands in the same columns.
    Positions count from each row's first token; padding stands at position 0, masked.
    """
    width = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids_BT[index, width - len(row) :] = row
        mask_BT[index, width - len(row) :] = 1
    positions_BT = np.maximum(mask_BT.cumsum(axis=1) - 1, 0)
    return {
        "input_ids": torch.from_numpy(ids_BT),
        "attention_mask": torch.from_numpy(mask_BT),
        "position_ids": torch.from_numpy(positions_BT),
    }


def right_padded(rows: Sequence[Row], pad_id: int) -> Inputs:
    """input_ids and attention_mask, each int64 [B, T]; every row begins at column 0.

    What classification heads expect: encoders read their first token.
    """
    width = max(len(row) for row in rows)
    ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = row
        mask_BT[index, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids_BT), "attention_mask": torch.from_numpy(mask_BT)}


def classified(
    rows: TokenRows, index: Sequence[int] | NDArray[np.int64], model: torch.nn.Module
) -> Inputs:
    """What a classifier reads of some rows: texts side by side, or images."""
    if rows.pixels is not None:
        return {"pixel_values": torch.from_numpy(rows.images(np.asarray(index)))}
    return right_padded([rows.row(place) for place in index], pad_id_of(model))


def run_on(model: torch.nn.Module, inputs: Inputs, **options: Any) -> Any:
    """One forward pass on the model's device, without the arguments that it does not take.

    Behind a soft prompt rows stand as behind what was read before (`tasks/methods/soft.py`),
    which costs a pass over its tokens, once for a batch, and the longer attention.

    Models without learned or rotary positions (ALiBi) take no `position_ids`; a few old ones
    cannot leave out logits. Both are only left out, as the result does not depend on them.
    """
    accepted = argument_names(type(base_of(model)).forward)
    place = next(model.parameters()).device
    everything = {name: tensor.to(place) for name, tensor in inputs.items()} | options
    return soft.run(
        model, **{name: value for name, value in everything.items() if name in accepted}
    )


@cache
def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    inner: torch.nn.Module = model if unwrap is None else unwrap()
    return inner


def is_pair_model(model: torch.nn.Module) -> bool:
    """Whether an encoder reads and a decoder writes, so that a row is a source and a target."""
    config: Any = base_of(model).config
    return bool(getattr(config, "is_encoder_decoder", False))


def pad_id_of(model: torch.nn.Module) -> int:
    """The id that fills up rows. A model without one gets 0, which the mask hides.

    Decoders with a classification head look for the last token that is not padding, so the
    configuration must name the id that the batches use.
    """
    config: Any = base_of(model).config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    return int(config.pad_token_id)


def context_limit(model: torch.nn.Module, reading: bool = False) -> int | None:
    """Positions that the model has for rows, or None where it names no limit.

    reading: of an encoder-decoder, those of the encoder, and not those of what is written.
    """
    config: Any = base_of(model).config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    elsewhere = is_pair_model(model) and soft.is_cache(model) == reading
    return int(limit) - (0 if elsewhere else soft.virtual_tokens(model))
