"""Who writes the same greedy answers, and how long each takes, in turns.

Every contender is `write(prompts) -> (answers, account)`; the account is of our loop alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig

from tasks.evaluate.batches import left_padded, pad_id_of
from tasks.evaluate.latency import quiet
from tasks.evaluate.speculation import cut
from tasks.speculate.decode import Account, Writer
from tasks.speculate.heads import TurboHeads
from tasks.speculate.pace import Pace
from tasks.speculate.parts import Parts

Write = Callable[[list[list[int]]], tuple[list[list[int]], Account | None]]

GENERATE, STATIC, LOOKUP, ASSISTED = (
    "generate",
    "generate, static cache, compiled",
    "generate, prompt lookup",
    "generate, assisted",
)
PLAIN, HEADS, HEADS_ALONE, COPIES, MEDUSA = (
    "loop",
    "loop, heads",
    "loop, heads without lookup",
    "loop, lookup alone",
    "loop, Medusa-1",
)
#: Of transformers' contenders those that write one answer at a time alone.
SINGLE = (LOOKUP, ASSISTED)
#: Tokens that transformers' prompt lookup copies: its documentation's number.
LOOKUP_TOKENS = 10


@dataclass
class Clock:
    """seconds, tokens: of each turn. account: of all turns."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    account: Account = field(default_factory=Account)

    @property
    def rate(self) -> float:
        return sum(self.tokens) / sum(self.seconds)

    def each(self) -> list[float]:
        """Seconds a token, turn by turn."""
        return [s / max(n, 1) for s, n in zip(self.seconds, self.tokens, strict=True)]


@dataclass(frozen=True)
class Desk:
    """What all contenders of one model share. longest: tokens of an answer."""

    model: Any
    parts: Parts
    stops: frozenset[int]
    longest: int

    def generate(self, **settings: Any) -> Write:
        """transformers' generate(), with these settings beside greedy ones."""

        @torch.inference_mode()
        def write(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
            assistant = {k: settings[k] for k in ("assistant_model",) if k in settings}
            config = GenerationConfig(
                max_new_tokens=self.longest,
                do_sample=False,
                eos_token_id=sorted(self.stops),
                pad_token_id=pad_id_of(self.model),
                **{k: v for k, v in settings.items() if k not in assistant},
            )
            batch = left_padded(prompts, pad_id_of(self.model))  # type: ignore[arg-type]
            written_BT = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=config,
                **assistant,
            )[:, batch["input_ids"].shape[1] :]
            return [cut(row, self.stops) for row in written_BT.tolist()], None

        return write

    def static(self) -> Write:
        """A static cache, and the forward pass compiled by inductor."""
        compiled = CompileConfig(fullgraph=False, dynamic=True, mode="default")
        compiled._compile_all_devices = True
        return self.generate(cache_implementation="static", compile_config=compiled)

    def loop(
        self, heads: TurboHeads | None = None, lookup: bool = False, pace: Pace | None = None
    ) -> Write:
        writer = Writer(self.parts, heads, lookup=lookup, pace=pace)
        return lambda prompts: writer.write(prompts, self.longest, self.stops)


def race(
    contenders: dict[str, Write], asked: list[list[list[int]]], warm_ups: int
) -> tuple[dict[str, Clock], dict[str, int]]:
    """Every contender answers every turn's prompts; the first `warm_ups` turns are not timed.

    Returns the clocks, and of each contender how many answers are those of the first one.
    """
    clocks = {name: Clock() for name in contenders}
    alike = dict.fromkeys(contenders, 0)
    with quiet():
        for turn, prompts in enumerate(asked):
            found = {}
            for name in order(list(contenders), turn):
                began = time.perf_counter()
                found[name], account = contenders[name](prompts)
                seconds = time.perf_counter() - began
                if turn >= warm_ups:
                    clocks[name].seconds.append(seconds)
                    clocks[name].tokens.append(sum(map(len, found[name])))
                    if account is not None:
                        add(clocks[name].account, account)
            first = found[next(iter(contenders))]
            for name, answers in found.items():
                alike[name] += sum(a == b for a, b in zip(answers, first, strict=True))
    return clocks, alike


def order(names: list[str], turn: int) -> list[str]:
    """Another order each turn, so that what one leaves in the caches meets all others alike."""
    count = len(names)
    shifted = [names[(place + turn) % count] for place in range(count)]
    return shifted if turn // count % 2 == 0 else shifted[::-1]


def add(total: Account, one: Account) -> None:
    total.passes += one.passes
    total.nodes += one.nodes
    for name in ("lengths", "drafted", "accepted"):
        counts = getattr(total, name)
        for key, count in getattr(one, name).items():
            counts[key] = counts.get(key, 0) + count
