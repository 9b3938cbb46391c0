"""Criterion 5, inference overhead: prefill and per-token latency beside the base's.

All models are in memory at once and take turns, one measurement each, so that whatever else
the machine does meets all of them. A disabled adapter is not the base: its wrapper still costs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations, product
from typing import Any

import numpy as np
import torch

from schemas.recipe import Evaluate
from schemas.report import Interval, Latency
from schemas.tasks import is_encoder_decoder, is_labelled, reads_images
from tasks.core.progress import bar, warn
from tasks.core.tokens import TokenRows
from tasks.evaluate import workload
from tasks.evaluate.batches import Inputs, run_on
from tasks.evaluate.writing import writer_of

#: Tokens decoded after each prefill: enough for a steady p95 without leaving the prompt's length.
DECODE_TOKENS = 4
WARM_UPS = 2


@dataclass
class Times:
    """Milliseconds of one model at one batch size."""

    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)


def how(evaluate: Evaluate, task: str, threads: int) -> str:
    """The measurement in words."""
    decoded = (
        f", then {DECODE_TOKENS} greedy tokens with the cache, each timed by itself"
        if not is_labelled(task)
        else " (a classification decodes nothing)"
    )
    lengths = " or ".join(str(length) for length in evaluate.prompt_lengths)
    read = "images" if reads_images(task) else f"{lengths} prompt tokens"
    if is_encoder_decoder(task):
        read += " by the encoder, and over the decoder's start token"
    return (
        f"forward pass over {read}{decoded}; "
        f"{WARM_UPS} warm-ups, {evaluate.repeats} repeats, models taking turns in one process "
        f"({threads} threads); p50 and p95; ratios to the base's of the same turn, their median "
        "and its 95 % interval (order statistics, turns taken as independent)"
    )


def measure(
    models: dict[str, torch.nn.Module],
    rows: TokenRows,
    task: str,
    evaluate: Evaluate,
    merged: frozenset[str],
    more: dict[str, int] | None = None,
) -> list[Latency]:
    """One row for each model, prompt length and batch size, but for the reference among others.

    The recipe's first prompt length comes first, cut where the context is shorter; a further one
    that does not fit is left out, aloud. An image has one length, which is no prompt's.

    Args:
        models: name to model; `base` is the reference. Alone, it is measured against itself.
        merged: the names of those that are merged.
        more: by how many tokens a model's prompts are longer than `prompt_tokens`, by name.
    """
    results: list[Latency] = []
    orders = list(permutations(models))
    lengths: dict[int | None, dict[str, int]] = {None: dict.fromkeys(models, 0)}
    if not reads_images(task):
        lengths = prompt_lengths(models, evaluate, more or {})
    sizes = list(product(lengths, evaluate.batch_sizes))
    rounds = len(sizes) * (WARM_UPS + evaluate.repeats)
    with bar("latency", rounds, "rounds") as progress, torch.inference_mode(), quiet():
        for length, batch_size in sizes:
            batches = {
                name: workload.inputs(rows, task, batch_size, tokens)
                for name, tokens in lengths[length].items()
            }
            times = {name: Times() for name in models}
            for turn in range(WARM_UPS + evaluate.repeats):
                # Every order in turn: what a model leaves in the caches meets all others alike.
                for name in orders[turn % len(orders)]:
                    sink = times[name] if turn >= WARM_UPS else Times()
                    time_once(models[name], batches[name], task, sink)
                progress.advance()
            for name in models:
                if name != "base" or len(models) == 1:
                    place = (batch_size, length, name in merged)
                    results.append(summary(times[name], times["base"], *place))
    return results


def prompt_lengths(
    models: dict[str, torch.nn.Module], evaluate: Evaluate, more: dict[str, int]
) -> dict[int | None, dict[str, int]]:
    """Each prompt length of the recipe that can be had: the tokens that are timed for it by each
    model, the same for all but for what examples add. Virtual tokens take up some of a context.
    """
    fitting: dict[int | None, dict[str, int]] = {}
    for length in evaluate.prompt_lengths:
        alike = min(fit(model, length) for model in models.values())
        tokens = {name: fit(model, alike + more.get(name, 0)) for name, model in models.items()}
        whole = all(tokens[name] == length + more.get(name, 0) for name in models)
        if fitting and not whole:
            warn(f"{length} prompt tokens do not fit into the context: left out of latency")
        else:
            fitting[length] = tokens
    return fitting


def fit(model: torch.nn.Module, tokens: int) -> int:
    return workload.prompt_length(model, tokens, DECODE_TOKENS)


def time_once(model: torch.nn.Module, batch: Inputs, task: str, sink: Times) -> None:
    """One prefill and, where answers are generated, a few tokens after it."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if is_labelled(task):
        _, elapsed = timed(partial(run_on, model, batch), device)
        sink.prefill.append(elapsed)
        return
    writer = writer_of(model, batch)
    logits_BV, elapsed = timed(writer.read, device)
    sink.prefill.append(elapsed)
    for _ in range(DECODE_TOKENS):
        logits_BV, elapsed = timed(partial(writer.write, logits_BV.argmax(dim=-1)), device)
        sink.token.append(elapsed)


def timed(step: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a step gives, and its milliseconds, waiting for the device."""
    wait(device)
    start = time.perf_counter()
    output = step()
    wait(device)
    return output, (time.perf_counter() - start) * 1e3


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(
    times: Times, base: Times, batch_size: int, prompt_tokens: int | None, merged: bool
) -> Latency:
    """Quantiles of one model's times, and its ratio to the base's."""
    decodes = bool(times.token)
    return Latency(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        merged=merged,
        prefill_p50_ms=quantile(times.prefill, 0.5),
        prefill_p95_ms=quantile(times.prefill, 0.95),
        token_p50_ms=quantile(times.token, 0.5) if decodes else None,
        token_p95_ms=quantile(times.token, 0.95) if decodes else None,
        prefill_ratio=median_ratio(times.prefill, base.prefill),
        token_ratio=median_ratio(per_turn(times), per_turn(base)) if decodes else None,
    )


def per_turn(times: Times) -> list[float]:
    """Milliseconds of all tokens that were decoded after each prefill."""
    turns = np.reshape(times.token, (len(times.prefill), -1))
    return [float(turn) for turn in turns.sum(axis=1)]


def median_ratio(own: list[float], base: list[float]) -> Interval:
    """The median over turns of one model's time by the base's in the same turn.

    What slows a turn down slows down both, so turns are compared and not medians. The interval is
    that of a median, between two of its order statistics (Conover 1999, Practical Nonparametric
    Statistics, 3.2); of fewer than six turns it is their whole range, and holds less than 95 %.
    """
    ratios = np.sort(np.asarray(own) / np.asarray(base))
    count, outside = len(ratios), 0
    # So many at either end are left out as 2.5 % of fair coins' tails allow.
    while sum(math.comb(count, heads) for heads in range(outside + 1)) <= 0.025 * 2**count:
        outside += 1
    outside = max(outside, 1)
    low, high = float(ratios[outside - 1]), float(ratios[count - outside])
    return Interval(value=float(np.median(ratios)), low=low, high=high)


def quantile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share))


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection while timing: its pauses would land on whoever runs then."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
