"""The training loop, for every method and both tasks.

A step: the rows that the plan gives it, in micro-batches; the sum of their losses over the
answer tokens of the whole step; clip; AdamW in float32 at the schedule's rate. Everything that
a step depends on is in `RunState`, the weights, the optimiser and the random generators, which
is what a checkpoint holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from schemas.recipe import Train
from schemas.report import CurvePoint
from tasks.core.checkpoint import Checkpoints, RunState
from tasks.core.plan import Rows
from tasks.core.progress import bar
from tasks.core.schedule import learning_rate, total_steps, warmup_steps
from tasks.core.tokens import TokenRows
from tasks.methods.course import Course
from tasks.train.batching import Batch, Layout, micro_batches
from tasks.train.loss import loss_sum
from tasks.train.pairs import batch_of, held_lengths
from tasks.train.watch import check_diverged, check_finite


class StepPlan(Protocol):
    """The rows of each step of an epoch: `batching.Plan`, or a benchmark's own order."""

    @property
    def steps_per_epoch(self) -> int: ...

    def epoch(self, epoch: int) -> Sequence[Rows]: ...


@dataclass(frozen=True)
class Job:
    """What a run trains on, and how.

    answers: what each row adds to the loss's denominator, [rows] (`batching.answer_tokens`).
    layout: how the rows of a step are cut into forward passes.
    dtype: of the products; `accelerator` has the device and the autocast that goes with it.
    chance: the loss of guessing, where the task has one.
    """

    rows: TokenRows
    answers: NDArray[np.int64]
    plan: StepPlan
    task: str
    train: Train
    accelerator: Accelerator
    dtype: torch.dtype
    layout: Layout
    chance: float | None = None

    @property
    def steps(self) -> int:
        return total_steps(self.train, self.plan.steps_per_epoch)

    def batch(self, rows: Rows) -> Batch:
        """The tensors of one micro-batch."""
        return batch_of(self.rows, rows, self.task, self.layout)

    def micro_batches(self, rows: Rows) -> list[Rows]:
        """The rows of one step, cut into forward passes."""
        return micro_batches(rows, held_lengths(self.rows, self.task), self.layout)


def train(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    job: Job,
    checkpoints: Checkpoints | None = None,
    state: RunState | None = None,
    course: Course | None = None,
) -> RunState:
    """Train `weights` of `model` in place, from `state` (a restored run) to the last step.

    course: what the method does beside what the optimiser does.

    Raises:
        StageError: a loss that is no number, or a run that diverged.
    """
    state = state or RunState()
    course = course or Course(model, None, job.steps)
    warmup = warmup_steps(job.train, job.steps)
    began, before = time.monotonic(), state.seconds
    saved = time.monotonic()
    epoch, steps = -1, []
    with bar("train", job.steps, "steps", done=state.step) as progress:
        while state.step < job.steps:
            if state.step // job.plan.steps_per_epoch != epoch:
                epoch = state.step // job.plan.steps_per_epoch
                steps = list(job.plan.epoch(epoch))
            rows = steps[state.step % job.plan.steps_per_epoch]
            point = _step(model, weights, optimizer, job, state, rows, course)
            check_finite(point)
            state.step, state.tokens = point.step, point.tokens
            state.seconds = before + time.monotonic() - began
            state.curve.append(point)
            check_diverged(state.curve, warmup, job.chance)
            progress.advance(loss=point.loss, tokens_per_s=round(state.tokens / state.seconds))
            due = time.monotonic() - saved >= job.train.checkpoint_every_s
            if checkpoints is not None and due and state.step < job.steps:
                checkpoints.save(state, weights, optimizer, course)
                saved = time.monotonic()
    return state


def _step(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    job: Job,
    state: RunState,
    rows: Rows,
    course: Course,
) -> CurvePoint:
    """One optimiser step."""
    started = time.perf_counter()
    rate = learning_rate(job.train, state.step, job.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]
    answers = int(job.answers[rows].sum())

    total = torch.zeros((), device=job.accelerator.device)
    for part in job.micro_batches(rows):
        batch = job.batch(part).to(job.accelerator.device)
        with job.accelerator.autocast():
            loss = loss_sum(model, batch, job.dtype) / answers
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if (penalty := course.penalty()) is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), job.train.max_grad_norm)
    optimizer.step()
    course.after_step(state.step + 1)
    optimizer.zero_grad(set_to_none=True)
    return CurvePoint(
        step=state.step + 1,
        epoch=(state.step + 1) / job.plan.steps_per_epoch,
        loss=float(total),
        learning_rate=rate,
        grad_norm=float(norm),
        tokens=state.tokens + int(job.rows.lengths[rows].sum()),
        step_time_s=time.perf_counter() - started,
    )


def make_optimizer(
    weights: dict[str, nn.Parameter],
    train: Train,
    times: Callable[[str], float] = lambda name: 1.0,
    decays: Callable[[str], bool] = lambda name: True,
    paged: bool = False,
) -> torch.optim.Optimizer:
    """AdamW with its moments in float32; biases and norms do not decay.

    times: what the schedule's rate is multiplied with for a weight of that name.
    decays: whether a matrix of that name does.
    paged: moments in memory that a GPU shares with the host (`tasks/train/paged.py`).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, weight in weights.items():
        kept = weight.ndim < 2 or not decays(name)
        groups.setdefault((kept, times(name)), []).append(weight)
    described: list[dict[str, Any]] = [
        {
            "params": groups[kept, factor],
            "weight_decay": 0.0 if kept else train.weight_decay,
            "times": factor,
        }
        for kept, factor in sorted(groups)
    ]
    if paged:
        from tasks.train.paged import PagedAdamW  # bitsandbytes takes its time

        return PagedAdamW(described, lr=train.learning_rate)
    return torch.optim.AdamW(described, lr=train.learning_rate, fused=True)
