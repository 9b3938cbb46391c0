"""The training loop of the heads, over the stored states. A killed run ends in the same bytes.

Shapes: T positions of a step, C of them that it learns from, K heads, D hidden width.
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
from tasks.turbo.foresee import Ahead, foreseen, learned_from, left
from tasks.turbo.loss import HeadLoss, Scored, lanes, target_of
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
    epoch, scored = -1, scored_by(parts)
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
            at_C = learned_from(texts, turbo, state.step)
            loss = heads_loss(heads, parts, scored, texts, turbo, with_state, at_C)
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


def scored_by(parts: Parts) -> Scored:
    return Scored.of(parts.scored, getattr(parts.lm_head, "bias", None))


def heads_loss(
    heads: TurboHeads,
    parts: Parts,
    scored: Scored,
    texts: Texts,
    turbo: Turbo,
    with_state: bool,
    at_C: torch.Tensor,
) -> torch.Tensor:
    """The mean over what the heads foresee from some positions, a float32 scalar in nats.

    scored: of the model's lm_head, as `scored_by` makes it.
    """
    device = parts.device
    x_TD, tokens_T = texts.states_TD.to(device), texts.tokens_T.to(device).long()
    every_T = torch.arange(lanes(len(x_TD)), device=device).clamp(max=len(x_TD) - 1)
    target = target_of(x_TD[every_T], tokens_T[every_T], scored, turbo.hard)

    ahead = Ahead.of(left(texts), at_C, heads.config.heads)
    loss, total = torch.zeros((), device=device), 0.0
    for k, h_CD in enumerate(foreseen(heads, parts, x_TD, tokens_T, with_state, ahead), start=1):
        weight, count = turbo.decay ** (k - 1), ahead.counts_K[k - 1]
        weights_C = weight * (torch.arange(len(h_CD), device=device) < count)
        part: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
            h_CD, target.at(ahead.after(k, k).to(device)), weights_C, scored
        )
        loss, total = loss + part, total + weight * count
    return loss / max(total, 1e-9)


@torch.inference_mode()
def agreement(heads: TurboHeads, parts: Parts, states: States, chosen: np.ndarray) -> Agreement:
    """How often each head is right (see `Agreement`) on the chosen texts; one after another, since
    all their logits together are many."""
    right, told = np.zeros((2, heads.config.heads)), np.zeros(heads.config.heads)
    for index in chosen:
        texts = states.texts(np.array([index]))
        x_TD, tokens_T = texts.states_TD.to(parts.device), texts.tokens_T.to(parts.device).long()
        own_T = parts.lm_head(x_TD).argmax(-1)
        ahead = Ahead.of(left(texts), torch.arange(len(x_TD)), heads.config.heads)
        for with_state in (False, True):
            every = foreseen(heads, parts, x_TD, tokens_T, with_state, ahead)
            for k, (h_CD, count) in enumerate(zip(every, ahead.counts_K, strict=True), start=1):
                guess_C = parts.lm_head(h_CD[:count]).argmax(-1)
                after_C = ahead.after(k, k)[:count].to(parts.device)
                right[int(with_state), k - 1] += int((guess_C == own_T[after_C]).sum())
        told += ahead.counts_K
    return Agreement(*(right / np.maximum(told, 1)).tolist())
