"""Test rows with examples in front of their prompts, as a few-shot subject is asked.

Shapes: N rows.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.recipe import Evaluate
from tasks.core.progress import warn
from tasks.core.shots import Asked, Shots, room_of
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import base_of
from tasks.evaluate.subject import Subject

#: Test rows of which the prompts' further tokens are counted.
SAMPLE = 64


@dataclass(frozen=True)
class Prompted:
    """How a model is asked: what stands before a prompt, and how much its context holds.

    config: the model's. new_tokens: room that is kept for an answer.
    """

    shots: Shots | None
    config: Any
    new_tokens: int

    def ask(self, prompt: NDArray[np.int32], answer_tokens: int = 0) -> Asked:
        """A prompt as it is asked; a known answer that is longer than `new_tokens` has room."""
        if self.shots is None:
            return Asked(prompt, [])
        room = room_of(self.config, max(self.new_tokens, answer_tokens))
        return self.shots.ask(prompt, room)

    def rows(self, rows: TokenRows) -> TokenRows:
        """The same rows and answers, asked so; examples are not learned, so not scored.

        Said aloud: how many rows have fewer examples than the recipe asks for.
        """
        if self.shots is None:
            return rows
        assert rows.answer_start is not None
        asked = [
            self.ask(rows.row(index)[:start], len(rows.row(index)) - start)
            for index, start in enumerate(rows.answer_start.tolist())
        ]
        warn_of_fewer(self.shots.count, [len(one.examples) for one in asked])
        parts, masks = [], []
        for index, one in enumerate(asked):
            answer = rows.row(index)[rows.answer_start[index] :]
            mask = np.zeros(len(one.tokens) + len(answer), dtype=np.uint8)
            # A BOS that was dropped is not learned either, so the mask may lie over it.
            mask[-len(rows.mask(index)) :] = rows.mask(index)
            parts.append(np.concatenate([one.tokens, answer]))
            masks.append(mask)
        return TokenRows(
            input_ids=np.concatenate(parts),
            offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
            source_rows=rows.source_rows,
            loss_mask=np.concatenate(masks),
            answer_start=np.array([len(one.tokens) for one in asked], dtype=np.int64),
        )

    def more_tokens(self, rows: TokenRows) -> int:
        """By how many tokens the examples lengthen a prompt: the median of the first rows."""
        if self.shots is None:
            return 0
        assert rows.answer_start is not None
        prompts = [
            rows.row(index)[:start] for index, start in enumerate(rows.answer_start[:SAMPLE])
        ]
        return int(statistics.median(len(self.ask(one).tokens) - len(one) for one in prompts))


def asking(subject: Subject, model: torch.nn.Module, evaluate: Evaluate) -> Prompted:
    """How a subject, loaded, is asked."""
    return Prompted(subject.shots(), base_of(model).config, evaluate.max_new_tokens)


def warn_of_fewer(wanted: int, shown: list[int]) -> None:
    """Say how many prompts have fewer examples than asked for."""
    fewer = [count for count in shown if count < wanted]
    if fewer:
        warn(
            f"the context holds fewer than {wanted} examples before {len(fewer)} of {len(shown)} "
            f"test rows, the smallest count is {min(fewer)}: ask for fewer examples"
        )
