"""Forward passes over held-out rows: the loss of each answer, the logits of each class, the
label of each token.

Shapes: N rows, B rows of a batch, T positions, K kept positions, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from tasks.core.entities import IGNORED
from tasks.core.progress import bar
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import (
    BATCH_TOKENS,
    base_of,
    by_length,
    classified,
    is_pair_model,
    left_padded,
    pad_id_of,
    run_on,
)
from tasks.evaluate.pairs import pair_losses

#: Logits in one forward pass: 2**26 of them are 256 MiB in float32.
BATCH_LOGITS = 2**26


@torch.inference_mode()
def answer_losses(
    model: torch.nn.Module, rows: TokenRows, label: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The summed cross entropy (nats) and the number of learned tokens of each row, both [N].

    Teacher forcing: each learned token is predicted from the true tokens before it. Softmax and
    sum are in float32 and float64, whatever the model's dtype.
    """
    losses = pair_losses if is_pair_model(model) else continued_losses
    config: Any = base_of(model).config
    vocabulary = int(config.get_text_config().vocab_size)
    budget = max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocabulary))
    loss_N = np.zeros(len(rows), dtype=np.float64)
    tokens_N = np.zeros(len(rows), dtype=np.int64)
    with bar(label, len(rows), "rows") as progress:
        for group in by_length(rows.lengths, max_tokens=budget):
            loss_B, tokens_B = losses(model, rows, group)
            loss_N[group] = loss_B.double().cpu().numpy()
            tokens_N[group] = tokens_B.cpu().numpy()
            progress.advance(len(group))
    return loss_N, tokens_N


def continued_losses(
    model: torch.nn.Module, rows: TokenRows, group: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy of what each row learns, float64 [B], and its tokens, [B], by a
    decoder alone.

    Rows are padded on the left, so that answers end in the same column and the head computes only
    the columns that hold one.
    """
    inputs = left_padded([rows.row(index) for index in group], pad_id_of(model))
    learned_BT = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for place, index in enumerate(group):
        mask = rows.mask(index).astype(bool)
        # Nothing stands before a row's first token, so nothing predicts it.
        learned_BT[place, learned_BT.shape[1] - len(mask) + 1 :] = torch.from_numpy(mask[1:])
    return masked_losses(model, inputs, learned_BT), learned_BT.sum(dim=1)


def masked_losses(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], learned_BT: torch.Tensor
) -> torch.Tensor:
    """The summed cross entropy of each row's learned tokens, float64 [B], differentiable.

    A model that cannot leave out logits returns all T; the last K are the same either way.
    """
    columns = learned_BT.any(dim=0).nonzero()
    if len(columns) == 0:
        return torch.zeros(len(learned_BT), dtype=torch.float64)
    # Column t is predicted by the logits of column t - 1.
    keep = learned_BT.shape[1] - int(columns[0]) + 1
    logits_BKV = run_on(model, inputs, logits_to_keep=keep, use_cache=False).logits[:, -keep:-1]
    learned_BK = learned_BT[:, -keep + 1 :].to(logits_BKV.device)
    targets_BK = inputs["input_ids"][:, -keep + 1 :].to(logits_BKV.device)
    losses = cross_entropy(
        logits_BKV[learned_BK].float(), targets_BK[learned_BK], reduction="none"
    ).double()
    row = learned_BK.nonzero()[:, 0]
    return torch.zeros(len(learned_BT), dtype=torch.float64, device=losses.device).index_add(
        0, row, losses
    )


@torch.inference_mode()
def class_logits(model: torch.nn.Module, rows: TokenRows, label: str) -> NDArray[np.float32]:
    """The class logits of every row, [N, C]."""
    logits: NDArray[np.float32] | None = None
    for group, logits_BC in head_logits(model, rows, label):
        if logits is None:
            logits = np.zeros((len(rows), logits_BC.shape[1]), dtype=np.float32)
        logits[group] = logits_BC.cpu().numpy()
    assert logits is not None, "a prepared split has rows"
    return logits


def head_logits(
    model: torch.nn.Module, rows: TokenRows, label: str
) -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
    """Groups of rows, each with its float32 logits: [B, C], or [B, T, C] of every position."""
    with bar(label, len(rows), "rows") as progress:
        for group in by_length(rows.lengths):
            inputs = classified(rows, group, model)
            yield group, run_on(model, inputs).logits.float()
            progress.advance(len(group))


@dataclass(frozen=True)
class TokenScores:
    """Of every token of the T: its most probable label, that label's probability, and the loss
    of its true label (nats; 0 where it has none)."""

    label_T: NDArray[np.int64]
    probability_T: NDArray[np.float64]
    loss_T: NDArray[np.float64]


@torch.inference_mode()
def token_scores(model: torch.nn.Module, rows: TokenRows, label: str) -> TokenScores:
    """The labels that a model gives to every token of the rows, [T]."""
    assert rows.token_labels is not None
    total = len(rows.input_ids)
    label_T, probability_T, loss_T = np.zeros(total, np.int64), np.zeros(total), np.zeros(total)
    for group, logits_BTC in head_logits(model, rows, label):
        for index, logits_TC in zip(group.tolist(), logits_BTC, strict=True):
            place = rows.place(index)
            log_TC = logits_TC[: place.stop - place.start].double().log_softmax(-1).cpu()
            true_T = torch.from_numpy(rows.token_labels[place]).long()
            best_T = log_TC.max(-1)
            label_T[place] = best_T.indices.numpy()
            probability_T[place] = best_T.values.exp().numpy()
            loss_T[place] = cross_entropy(
                log_TC, true_T, reduction="none", ignore_index=IGNORED
            ).numpy()
    return TokenScores(label_T, probability_T, loss_T)
