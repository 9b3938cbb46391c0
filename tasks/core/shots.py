"""Examples in front of a prompt: which train rows, in which order, and the tokens that it becomes.

What a `prompt` entry ships, beside its base:

    prompt.json           examples: at most so many; choose: `similarity` to the prompt, or `seed`,
                          the same for all; bos: the token that only the first row keeps, or null
    examples.safetensors  the rows to choose from (`tasks/core/tokens.py`); absent where examples
                          is 0

The registered model's own code (`tasks/register/served_model.py`) imports nothing of this project
and has the same rules.

Shapes: N rows, T their tokens, P pairs of a token and a row that has it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.tokens import TokenRows

PROMPT = "prompt.json"
EXAMPLES = "examples.safetensors"

Choose = Literal["similarity", "seed"]
Row = NDArray[np.int32]

#: How soon a token's further occurrences stop to count, and how much a long row is discounted:
#: the usual values.
K1, B = 1.2, 0.75


class Similarity:
    """Okapi BM25 of a prompt to each of N others, over token ids.

    Robertson & Zaragoza 2009, doi:10.1561/1500000019, without relevance feedback:

        sum over the distinct tokens t of the prompt of
        ln(1 + (N - n_t + 0.5) / (n_t + 0.5)) f_t (K1 + 1) / (f_t + K1 (1 - B + B l / mean l))

    n_t: rows that have t. f_t: how often this row has it. l: the row's length.
    """

    def __init__(self, prompts: Sequence[Row]) -> None:
        self._count = count = len(prompts)
        length_N = np.array([len(prompt) for prompt in prompts], dtype=np.float64)
        token_T = np.concatenate([*prompts, np.empty(0, np.int32)]).astype(np.int64)
        row_T = np.repeat(np.arange(count), length_N.astype(np.int64))
        pair_P, times_P = np.unique(token_T * count + row_T, return_counts=True)
        self._row_P = pair_P % max(1, count)
        tokens, starts, rows_having = np.unique(
            pair_P // max(1, count), return_index=True, return_counts=True
        )
        ends = starts + rows_having
        self._places = dict(zip(tokens.tolist(), zip(starts, ends, strict=True), strict=True))
        rarity = np.log(1 + (count - rows_having + 0.5) / (rows_having + 0.5))
        discount_N = K1 * (1 - B + B * length_N / max(1.0, length_N.mean() if count else 1.0))
        saturated_P = times_P * (K1 + 1) / (times_P + discount_N[self._row_P])
        self._weight_P = np.repeat(rarity, rows_having) * saturated_P

    def scores(self, prompt: Row) -> NDArray[np.float64]:
        """How alike each row is to the prompt, [N]."""
        score_N = np.zeros(self._count)
        for token in np.unique(prompt).tolist():
            start, end = self._places.get(token, (0, 0))
            score_N[self._row_P[start:end]] += self._weight_P[start:end]
        return score_N


@dataclass(frozen=True)
class Asked:
    """A prompt as the model reads it. examples: indices of the rows before it, the nearest last."""

    tokens: Row
    examples: list[int]


@dataclass(frozen=True)
class Shots:
    """The rows to choose examples from, and how."""

    rows: TokenRows
    count: int
    choose: Choose
    bos: int | None

    def ask(self, prompt: Row, room: int | None) -> Asked:
        """The prompt behind as many examples as `room` tokens hold of all; None: no limit.

        The most similar example stands last, nearest to the question. Where there is no room for
        all, the first go.
        """
        chosen = self.nearest(prompt)
        while chosen:
            tokens = joined([*(self.rows.row(index) for index in chosen), prompt], self.bos)
            if room is None or len(tokens) <= room:
                return Asked(tokens, chosen)
            chosen = chosen[1:]
        return Asked(prompt, [])

    def nearest(self, prompt: Row) -> list[int]:
        """The rows that belong to a prompt, the most similar last. Of equals, the first in file
        order is the more similar."""
        if self.choose == "seed":
            return list(range(len(self.rows)))[::-1]
        order: list[int] = np.argsort(-self._similarity.scores(prompt), kind="stable").tolist()
        return order[: self.count][::-1]

    @cached_property
    def _similarity(self) -> Similarity:
        starts = self.rows.answer_start
        assert starts is not None, "rows of a causal task"
        return Similarity([self.rows.row(index)[:end] for index, end in enumerate(starts)])

    def save(self, model_dir: Path) -> None:
        settings = {"examples": self.count, "choose": self.choose, "bos": self.bos}
        (model_dir / PROMPT).write_text(json.dumps(settings) + "\n")
        if self.count:
            self.rows.save(model_dir / EXAMPLES)

    @classmethod
    def load(cls, model_dir: Path) -> Shots | None:
        """The examples of a `prompt` entry, or None where nothing stands before a prompt."""
        if not is_prompt(model_dir):
            return None
        settings = json.loads((model_dir / PROMPT).read_text())
        if settings["examples"] == 0:
            return None
        rows = TokenRows.load(model_dir / EXAMPLES)
        return cls(rows, settings["examples"], settings["choose"], settings["bos"])


def is_prompt(model_dir: Path) -> bool:
    """Whether `model/` of an entry is a prompt, for the base as it is."""
    return (model_dir / PROMPT).exists()


def joined(parts: Sequence[Row], bos: int | None) -> Row:
    """Rows end to end, of which the first alone keeps its BOS."""
    first, *others = parts
    later = (part[1:] if len(part) and part[0] == bos else part for part in others)
    return np.concatenate([first, *later])


def room_of(config: Any, new_tokens: int) -> int | None:
    """Tokens that leave `new_tokens` free in a model's context; None where it names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit) - new_tokens
