"""What goes wrong in training without an exception, turned into one with the cure."""

from __future__ import annotations

import hashlib
import math

import torch

from schemas.errors import StageError
from schemas.report import CurvePoint

#: Steps whose mean is "the loss now": wide enough that one hard batch is not a divergence.
WINDOW = 10


def check_finite(point: CurvePoint) -> None:
    """Raise a StageError for a loss or gradient that is no number any more."""
    for name, value in (("loss", point.loss), ("gradient norm", point.grad_norm)):
        if not math.isfinite(value):
            raise StageError(
                f"the {name} is {value} at step {point.step} (learning rate "
                f"{point.learning_rate:.2e}): lower train.learning_rate, raise "
                "train.warmup_ratio, or use base.dtype: float32"
            )


def check_diverged(curve: list[CurvePoint], warmup: int, chance: float | None) -> None:
    """Stop a run whose loss is, for a stretch after warm-up, above where it began.

    chance: the loss of guessing (ln of the number of labels), where the task has one. A
        classifier that has collapsed to guessing stays just above it.

    Raises:
        StageError: diverged, with the steps, the figures and the cure.
    """
    if len(curve) < warmup + 2 * WINDOW:
        return
    start = curve[0].loss if chance is None else min(curve[0].loss, chance)
    recent = mean_loss(curve[-WINDOW:])
    if recent <= start * 1.002:
        return
    peak = max(point.learning_rate for point in curve)
    raise StageError(
        f"diverged: the mean loss of steps {curve[-WINDOW].step} to {curve[-1].step} is "
        f"{recent:.4f}, above the {start:.4f} "
        + ("of guessing" if start == chance else "of the untrained model")
        + f", at a learning rate of {peak:.2e}: lower train.learning_rate "
        f"(try {peak / 4:.1e}) or raise train.warmup_ratio"
    )


def mean_loss(points: list[CurvePoint]) -> float:
    return sum(point.loss for point in points) / len(points)


def digests(weights: dict[str, torch.nn.Parameter]) -> dict[str, bytes]:
    """A hash of each weight's bytes: to see later whether it moved, without a copy of it."""
    return {
        name: hashlib.sha256(weight.detach().cpu().numpy().tobytes()).digest()
        for name, weight in weights.items()
    }


def unmoved(before: dict[str, bytes], weights: dict[str, torch.nn.Parameter]) -> list[str]:
    """The names of trained weights that are bit for bit what they were."""
    after = digests(weights)
    return [name for name, digest in before.items() if after[name] == digest]
