"""The training loop of the heads, over the stored states. A killed run ends in the same bytes.

Shapes: T positions of a step, K heads, D hidden width, S width of the state.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from schemas.errors import StageError
from schemas.recipe import Train
from schemas.report import CurvePoint
from schemas.turbo import Turbo
from tasks.core.checkpoint import Checkpoints, RunState
from tasks.core.plan import Plan
from tasks.core.progress import bar
from tasks.core.schedule import learning_rate, total_steps
from tasks.speculate.heads import TurboHeads
from tasks.speculate.parts import Parts
from tasks.turbo.loss import HeadsLoss
from tasks.turbo.states import States, Texts


class Nothing:
    """A run keeps nothing beside its weights and optimiser."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to go on from."""


@dataclass(frozen=True)
class Agreement:
    """Of each head, how often its likeliest token is the model's, on texts it has not learned.

    followed: with the tokens before it known to the state, as in a draft that was right so far.
    """

    alone: list[float]
    followed: list[float]


def schedule_of(turbo: Turbo) -> Train:
    return Train(
        epochs=turbo.epochs,
        learning_rate=turbo.learning_rate,
        batch_tokens=turbo.batch_tokens,
        warmup_ratio=0.05,
        seed=turbo.seed,
    )


def distil(
    heads: TurboHeads,
    parts: Parts,
    states: States,
    chosen: np.ndarray,
    turbo: Turbo,
    checkpoints: Checkpoints,
) -> RunState:
    """Train the heads in place on the chosen texts.

    Raises:
        StageError: a loss that is no number.
    """
    train = schedule_of(turbo)
    plan = Plan(states.lengths[chosen], turbo.batch_tokens, turbo.seed)
    steps = total_steps(train, plan.steps_per_epoch)
    weights: dict[str, torch.nn.Parameter] = dict(heads.named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), weight_decay=0.0, fused=True)
    state = checkpoints.restore(weights, optimizer, Nothing()) or RunState()
    began, before, saved = time.monotonic(), state.seconds, time.monotonic()
    order: list[np.ndarray] = []
    epoch = -1
    with bar("distil", steps, "steps", done=state.step) as progress:
        while state.step < steps:
            if state.step // plan.steps_per_epoch != epoch:
                epoch = state.step // plan.steps_per_epoch
                order = list(plan.epoch(epoch))
            texts = states.texts(chosen[order[state.step % plan.steps_per_epoch]])
            started = time.perf_counter()
            rate = learning_rate(train, state.step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with_state = not without_state(turbo, state.step)
            loss = heads_loss(heads, parts, texts, turbo, with_state)
            if not math.isfinite(nats := loss.item()):
                raise StageError(
                    f"the heads' loss is {nats} at step {state.step + 1}; lower "
                    "finish.turbo.learning_rate"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.tokens += len(texts.tokens_T)
            state.seconds = before + time.monotonic() - began
            state.curve.append(
                CurvePoint(
                    step=state.step,
                    epoch=state.step / plan.steps_per_epoch,
                    loss=nats,
                    learning_rate=rate,
                    grad_norm=float(norm),
                    tokens=state.tokens,
                    step_time_s=time.perf_counter() - started,
                )
            )
            progress.advance(loss=nats)
            due = time.monotonic() - saved >= turbo.checkpoint_every_s
            if due and state.step < steps:
                checkpoints.save(state, weights, optimizer, Nothing())
                saved = time.monotonic()
    return state


def without_state(turbo: Turbo, step: int) -> bool:
    """Whether a step leaves the state out, so that the heads learn to draft by themselves too."""
    drawn: float = np.random.default_rng([turbo.seed, 1, step]).random()
    return drawn < turbo.state_dropout


def heads_loss(
    heads: TurboHeads, parts: Parts, texts: Texts, turbo: Turbo, with_state: bool
) -> torch.Tensor:
    """The mean over what the heads foresee, a float32 scalar in nats."""
    device = parts.device
    x_TD, tokens_T = texts.states_TD.to(device), texts.tokens_T.to(device).long()
    left_T = left(texts).to(device)
    h_KTD = foreseen(heads, parts, x_TD, tokens_T, with_state)
    weights_K = [turbo.decay**k for k in range(heads.config.heads)]
    total = sum(weight * int((left_T >= k).sum()) for k, weight in enumerate(weights_K, start=1))
    loss: torch.Tensor = HeadsLoss.apply(  # type: ignore[no-untyped-call]
        h_KTD,
        x_TD,
        parts.scored.detach(),
        getattr(parts.lm_head, "bias", None),
        tokens_T,
        left_T,
        weights_K,
        turbo.hard,
    )
    return loss / max(total, 1e-9)


def left(texts: Texts) -> torch.Tensor:
    """How many positions of its text come after each, [T]."""
    lengths_N = texts.offsets.diff()
    ends_T = torch.repeat_interleave(texts.offsets[1:], lengths_N)
    return ends_T - 1 - torch.arange(len(ends_T))


def foreseen(
    heads: TurboHeads,
    parts: Parts,
    x_TD: torch.Tensor,
    tokens_T: torch.Tensor,
    with_state: bool,
) -> torch.Tensor:
    """What each head would have the lm_head read at each position, [K, T, D] in float32; with the
    state, behind the tokens that were really written. Past the end of a text it is nothing real."""
    x_TD = x_TD.float()
    h_KTD = heads.ahead(x_TD)
    if not (with_state and heads.config.state):
        return h_KTD
    begun_TS, state_TS = heads.begin(x_TD), None
    # Of the tokens that are written only: for large vocabularies a small part of the embeddings.
    written_TS = heads.read(parts.embed(tokens_T).float().detach())
    added = []
    for k in range(1, heads.config.heads + 1):
        # Head k follows the tokens written at t .. t + k - 1.
        before_TS = torch.cat([written_TS[k - 1 :], written_TS[: k - 1]])
        state_TS = heads.follow(state_TS, before_TS, begun_TS)
        added.append(heads.correction(state_TS))
    return h_KTD + torch.stack(added)


@torch.inference_mode()
def agreement(heads: TurboHeads, parts: Parts, states: States, chosen: np.ndarray) -> Agreement:
    """How often each head is right (see `Agreement`) on the chosen texts; one after another, since
    all their logits together are many."""
    count = heads.config.heads
    right, told = np.zeros((2, count)), np.zeros(count)
    for index in chosen:
        texts = states.texts(np.array([index]))
        x_TD, tokens_T = texts.states_TD.to(parts.device), texts.tokens_T.to(parts.device).long()
        own_T = parts.lm_head(x_TD).argmax(-1)
        for with_state in (False, True):
            h_KTD = foreseen(heads, parts, x_TD, tokens_T, with_state)
            for k in range(1, min(count, len(own_T) - 1) + 1):
                guess_T = parts.lm_head(h_KTD[k - 1, :-k].to(x_TD.dtype)).argmax(-1)
                right[int(with_state), k - 1] += int((guess_T == own_T[k:]).sum())
        told += [max(len(own_T) - k, 0) for k in range(1, count + 1)]
    return Agreement(*(right / np.maximum(told, 1)).tolist())
