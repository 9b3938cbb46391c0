"""What Turbo heads do for the finished model: the same answers, and how much faster.

transformers' generate(), the loop without drafts and the loop with them answer the same rows in
turns, so that whatever else the machine does meets all three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from schemas.errors import UserError
from schemas.recipe import Evaluate
from schemas.report import Speculation, Speed
from tasks.core.models import load_tokenizer
from tasks.core.progress import bar, warn
from tasks.core.stops import stop_ids
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import left_padded, pad_id_of
from tasks.evaluate.latency import median_ratio, quiet
from tasks.evaluate.subject import Subject
from tasks.methods import soft
from tasks.speculate.decode import Account, Writer
from tasks.speculate.heads import WEIGHTS, TurboHeads
from tasks.speculate.parts import NotSpeculableError, parts_of
from tasks.speculate.trial import require_exact

#: Turns of each batch size, after one that is not timed, and rows of one of them at most.
TURNS, WARM_UPS = 12, 1

GENERATE, PLAIN, HEADS = "generate", "plain", "heads"


@dataclass
class Clock:
    """seconds, tokens: of each turn."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return sum(self.tokens) / max(sum(self.seconds), 1e-9)

    def each(self) -> list[float]:
        """Seconds a token, turn by turn."""
        return [s / max(n, 1) for s, n in zip(self.seconds, self.tokens, strict=True)]


def how(evaluate: Evaluate) -> str:
    """The measurement in words."""
    return (
        f"greedy answers of up to {evaluate.max_new_tokens} tokens to test prompts, prompts "
        f"included in the time, {TURNS} turns of each batch size after {WARM_UPS} that is not "
        "counted; transformers' generate(), the verifying loop without drafts and with them take "
        "turns on the same rows; ratios of seconds a token in the same turn, their median and its "
        "95 % interval (order statistics)"
    )


def measure(
    subject: Subject, model: torch.nn.Module, place: Path, rows: TokenRows, evaluate: Evaluate
) -> Speculation:
    """Speed at each of the recipe's batch sizes, and whether the answers are generate()'s.

    place: the heads' directory.
    """
    heads = TurboHeads.load(place)
    try:
        parts = parts_of(model)
        plain, fast = Writer(parts), Writer(parts, heads, lookup=True)
        require_exact(fast)
    except NotSpeculableError as error:
        raise UserError.at(
            "finish.turbo", str(error), "remove `turbo`, or choose another base or candidate"
        ) from error
    stops = stop_ids(model, load_tokenizer(subject.base), rows)
    assert rows.answer_start is not None, "rows of a causal task"
    prompts = [rows.row(i)[:start].tolist() for i, start in enumerate(rows.answer_start.tolist())]
    prompts = [prompt for prompt in prompts if prompt]
    speeds, alike, answered = [], 0, 0
    accepted: list[float] = []
    sizes = evaluate.batch_sizes
    with bar("speed with heads", len(sizes) * (TURNS + WARM_UPS), "turns") as progress, quiet():
        for size in sizes:
            clocks = {name: Clock() for name in (GENERATE, PLAIN, HEADS)}
            account = Account()
            orders = list(permutations(clocks))
            for turn in range(WARM_UPS + TURNS):
                asked = [prompts[(turn * size + i) % len(prompts)] for i in range(size)]
                longest = evaluate.max_new_tokens
                writers: dict[str, Callable[[], Any]] = {
                    GENERATE: partial(generated, model, asked, stops, longest),
                    PLAIN: partial(plain.write, asked, longest, stops),
                    HEADS: partial(fast.write, asked, longest, stops),
                }
                found: dict[str, list[list[int]]] = {}
                for name in orders[turn % len(orders)]:
                    started = time.perf_counter()
                    found[name], own = writers[name]()
                    seconds = time.perf_counter() - started
                    if turn >= WARM_UPS:
                        clocks[name].seconds.append(seconds)
                        clocks[name].tokens.append(sum(map(len, found[name])))
                        if name == HEADS:
                            add(account, own)
                answered += size
                alike += sum(
                    one == other for one, other in zip(found[GENERATE], found[HEADS], strict=True)
                )
                progress.advance()
            speeds.append(speed(size, clocks, account))
            accepted = accepted or [
                account.accepted[depth] / account.drafted[depth]
                for depth in sorted(account.drafted)
            ]
    if alike < answered and subject.dtype == "float32":
        warn(f"{answered - alike} of {answered} answers with heads differ from generate()'s")
    config = heads.config
    return Speculation(
        heads=config.heads,
        rank=config.rank,
        state=config.state,
        parameters=config.parameters,
        medusa_parameters=config.medusa_parameters,
        stored_bytes=(place / WEIGHTS).stat().st_size,
        speeds=speeds,
        accepted=accepted,
        rows=answered,
        alike=alike,
    )


def add(total: Account, one: Account) -> None:
    """Add what one writing took to the sum of several."""
    for name in ("lengths", "drafted", "accepted"):
        counts, more = getattr(total, name), getattr(one, name)
        for key, count in more.items():
            counts[key] = counts.get(key, 0) + count


def speed(size: int, clocks: dict[str, Clock], account: Account) -> Speed:
    generate, plain, heads = (clocks[name] for name in (GENERATE, PLAIN, HEADS))
    return Speed(
        batch_size=size,
        generate_tokens_per_s=generate.rate,
        plain_tokens_per_s=plain.rate,
        heads_tokens_per_s=heads.rate,
        speedup=median_ratio(generate.each(), heads.each()),
        speculation=median_ratio(plain.each(), heads.each()),
        tokens_per_pass=account.tokens_per_pass,
    )


@torch.inference_mode()
def generated(
    model: Any, prompts: list[list[int]], stops: frozenset[int], longest: int
) -> tuple[list[list[int]], None]:
    """transformers' own greedy answers, their stop token included."""
    if len(prompts) > 1 and soft.virtual_tokens(model):
        # PEFT counts positions from the padding on, so that a batch of these is wrong.
        alone = [generated(model, [prompt], stops, longest)[0] for prompt in prompts]
        return [answer for (answer,) in alone], None
    pad_id = pad_id_of(model)
    batch = left_padded(prompts, pad_id)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=sorted(stops),
        pad_token_id=pad_id,
    )
    ids_BT = batch["input_ids"].to(device)
    written_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=batch["attention_mask"].to(device),
        generation_config=settings,
    )[:, ids_BT.shape[1] :]
    return [cut(row, stops) for row in written_BT.tolist()], None


def cut(row: list[int], stops: frozenset[int]) -> list[int]:
    """An answer up to its stop token, without the padding of a batch behind it."""
    end = next((at for at, token in enumerate(row) if token in stops), len(row) - 1)
    return row[: end + 1]
