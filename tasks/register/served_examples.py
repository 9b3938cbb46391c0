"""Few-shot examples of a registered version: `served_model.py` runs this file from beside it.

It imports nothing of this project.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file


class Examples:
    """The train rows that stand in front of a prompt.

    Which ones, and in which order, are the rules of `tasks/core/shots.py` in the project that made
    this version: by BM25 over token ids (Robertson & Zaragoza 2009, doi:10.1561/1500000019), or
    always the same; the nearest last, and as many as there is room for.
    """

    K1, B = 1.2, 0.75

    def __init__(self, directory: Path) -> None:
        settings = json.loads((directory / "prompt.json").read_text())
        self.count, self.bos = settings["examples"], settings["bos"]
        rows = load_file(directory / "examples.safetensors")
        self.rows = np.split(rows["input_ids"], rows["offsets"][1:-1])
        self.by_similarity = settings["choose"] == "similarity"
        if self.by_similarity:
            ends = rows["answer_start"].tolist()
            self.index([row[:end] for row, end in zip(self.rows, ends, strict=True)])

    def ask(self, prompt: list[int], room: int | None) -> list[int]:
        """The prompt behind as many examples as `room` tokens hold of all; None: no limit."""
        chosen = self.nearest(prompt)
        while chosen:
            first, *others = (self.rows[row].tolist() for row in chosen)
            # The first row alone keeps its BOS.
            later = (part[1:] if part[:1] == [self.bos] else part for part in (*others, prompt))
            tokens: list[int] = sum(later, first)
            if room is None or len(tokens) <= room:
                return tokens
            chosen = chosen[1:]
        return prompt

    def nearest(self, prompt: list[int]) -> list[int]:
        """The rows that belong to a prompt, the most similar last."""
        if not self.by_similarity:
            return list(range(len(self.rows)))[::-1]
        order: list[int] = np.argsort(-self.scores(prompt), kind="stable").tolist()
        return order[: self.count][::-1]

    def index(self, prompts: list[NDArray[np.int32]]) -> None:
        """What each of a prompt's tokens adds to the score of each row that has it."""
        count = len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.float64)
        pairs = np.concatenate(prompts).astype(np.int64) * count
        pairs += np.repeat(np.arange(count), lengths.astype(np.int64))
        pairs, times = np.unique(pairs, return_counts=True)
        tokens, starts, having = np.unique(pairs // count, return_index=True, return_counts=True)
        self.having = pairs % count
        self.places = {
            token: slice(start, start + rows)
            for token, start, rows in zip(tokens.tolist(), starts, having, strict=True)
        }
        rarity = np.log(1 + (count - having + 0.5) / (having + 0.5))
        discount = self.K1 * (1 - self.B + self.B * lengths / max(1.0, lengths.mean()))
        saturated = times * (self.K1 + 1) / (times + discount[self.having])
        self.weights = np.repeat(rarity, having) * saturated

    def scores(self, prompt: list[int]) -> NDArray[np.float64]:
        found = np.zeros(len(self.rows))
        for token in sorted(set(prompt)):
            place = self.places.get(token, slice(0, 0))
            found[self.having[place]] += self.weights[place]
        return found
