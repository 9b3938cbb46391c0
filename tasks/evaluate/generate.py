"""Greedy answers for many prompts at once.

Rows are padded on the left within groups of similar length; rows that have ended leave the
batch, so a group costs its unfinished rows and not its longest. In float32 the answers are those
of one prompt at a time: padding is masked out and positions count from each row's first token.

Shapes: B rows still writing, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tasks.core.progress import bar
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import (
    Row,
    base_of,
    by_length,
    context_limit,
    left_padded,
    pad_id_of,
    run_on,
)

#: Prompt and answer tokens whose keys and values one batch may hold.
CACHE_TOKENS = 32768
GENERATE_ROWS = 128


@dataclass(frozen=True)
class Answer:
    """tokens: what was written, the stop token excluded. stopped: whether it came to one."""

    tokens: list[int]
    stopped: bool


def stop_ids(model: torch.nn.Module, tokenizer: Any, rows: TokenRows) -> frozenset[int]:
    """The ids that end an answer.

    Those that the model and its tokenizer name as end of sequence, and the special token with
    which the prepared answers end: an end of turn is often named nowhere but in the template.
    """
    found: set[int] = set()
    for holder in (getattr(base_of(model), "generation_config", None), base_of(model).config):
        named = getattr(holder, "eos_token_id", None)
        found.update([named] if isinstance(named, int) else named or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    assert rows.answer_start is not None
    for index in range(len(rows)):
        learned = rows.row(index)[rows.answer_start[index] :]
        ends = [int(token) for token in learned if int(token) in special]
        found.update(ends[-1:])
    return frozenset(found)


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Row],
    stops: frozenset[int],
    max_new_tokens: int,
    label: str = "generate",
) -> list[Answer]:
    """The greedy answer to each prompt, in the order of the prompts.

    An answer ends at a token of `stops`, after `max_new_tokens`, or at the last position that
    the model knows.
    """
    answers = [Answer([], False)] * len(prompts)
    lengths = np.array([len(prompt) + max_new_tokens for prompt in prompts], dtype=np.int64)
    with bar(label, len(prompts), "answers") as progress:
        for group in by_length(lengths, max_tokens=CACHE_TOKENS, max_rows=GENERATE_ROWS):
            written = generate_batch(
                model, [prompts[index] for index in group], stops, max_new_tokens
            )
            for index, answer in zip(group, written, strict=True):
                answers[index] = answer
            progress.advance(len(group))
    return answers


def generate_batch(
    model: torch.nn.Module, prompts: Sequence[Row], stops: frozenset[int], max_new_tokens: int
) -> list[Answer]:
    """The greedy answers of one left-padded batch."""
    device = next(model.parameters()).device
    inputs = left_padded(prompts, pad_id_of(model))
    mask_BT = inputs["attention_mask"].to(device)
    position_B = inputs["position_ids"][:, -1].to(device)
    limit = context_limit(model)
    room = [
        max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
        for prompt in prompts
    ]
    tokens: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    rows = list(range(len(prompts)))  # the prompt of each row of the batch

    output = run_on(model, inputs, logits_to_keep=1, use_cache=True)
    while True:
        cache = output.past_key_values
        next_B = output.logits[:, -1].argmax(dim=-1)
        going: list[int] = []
        for place, token in enumerate(next_B.tolist()):
            index = rows[place]
            if stopped[index] or len(tokens[index]) >= room[index]:
                continue
            if token in stops:
                stopped[index] = True
                continue
            tokens[index].append(token)
            if len(tokens[index]) < room[index]:
                going.append(place)
        if not going:
            return [Answer(*answer) for answer in zip(tokens, stopped, strict=True)]
        # Copying the cache costs about a step, so ended rows leave by halves, not one by one.
        if len(going) <= len(rows) // 2 and hasattr(cache, "batch_select_indices"):
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            mask_BT, position_B, next_B = mask_BT[kept], position_B[kept], next_B[kept]
            rows = [rows[place] for place in going]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
        # A row that has ended but not left writes on unread, and stays within the known positions.
        position_B = position_B + 1 if limit is None else (position_B + 1).clamp(max=limit - 1)
        output = run_on(
            model,
            {
                "input_ids": next_B[:, None],
                "attention_mask": mask_BT,
                "position_ids": position_B[:, None],
            },
            past_key_values=cache,
            logits_to_keep=1,
            use_cache=True,
        )
