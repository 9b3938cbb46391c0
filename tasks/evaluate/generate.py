"""Greedy answers for many prompts at once.

Rows are padded within groups of similar length; rows that have ended leave the batch, so a group
costs its unfinished rows and not its longest. In float32 the answers are those of one prompt at a
time: padding is masked out and positions count from each row's first token.

Shapes: B rows still writing, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tasks.core.progress import bar
from tasks.evaluate.batches import Row, by_length, pad_id_of
from tasks.evaluate.writing import padded_prompts, room_of, writer_of

#: Prompt and answer tokens whose keys and values one batch may hold.
CACHE_TOKENS = 32768
GENERATE_ROWS = 128


@dataclass(frozen=True)
class Answer:
    """tokens: what was written, the stop token excluded. stopped: whether it came to one."""

    tokens: list[int]
    stopped: bool


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
    """The greedy answers of one batch."""
    writer = writer_of(model, padded_prompts(model, prompts, pad_id_of(model)))
    room = room_of(model, prompts, max_new_tokens)
    tokens: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    rows = list(range(len(prompts)))  # the prompt of each row of the batch

    logits_BV = writer.read()
    while True:
        next_B = logits_BV.argmax(dim=-1)
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
        if len(going) <= len(rows) // 2 and writer.keep(going):
            next_B = next_B[going]
            rows = [rows[place] for place in going]
        logits_BV = writer.write(next_B)
