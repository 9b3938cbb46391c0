"""What goes wrong in training without an exception, turned into one with the cure."""

from __future__ import annotations

import hashlib
import math
import statistics

import torch

from schemas.errors import DivergedError
from schemas.report import CurvePoint

#: Steps that are "the loss now".
WINDOW = 10
#: A stretch long enough that a loss a little above the start is no accident.
STRETCH = 5 * WINDOW
#: How far above the start the loss of a window, and of a stretch, may be. Guessing is a firm
#: start, known and not measured on a few batches: a collapsed classifier stays 1 % above it.
WINDOW_MARGIN, STRETCH_MARGIN, GUESSING_MARGIN = 1.3, 1.05, 1.005
#: A loss below which a gradient may well be rounded to nothing: all is learned.
LEARNED = 0.01
#: A loss below this share of that of the stretch before is on its way down, wherever it is.
FALLING = 0.99


def check_finite(point: CurvePoint) -> None:
    """Raise a DivergedError for a loss or gradient that is no number any more."""
    for name, value in (("loss", point.loss), ("gradient norm", point.grad_norm)):
        if not math.isfinite(value):
            raise DivergedError(
                f"the {name} is {value} at step {point.step} (learning rate "
                f"{point.learning_rate:.2e}): lower train.learning_rate, raise "
                "train.warmup_ratio, or use base.dtype: float32 if it is bfloat16"
            )


def check_diverged(curve: list[CurvePoint], warmup: int, chance: float | None) -> None:
    """Stop a run whose loss after warm-up is above where it began, or that has gone dead.

    chance: the loss of guessing (ln of the number of labels), where the task has one.

    Raises:
        DivergedError: diverged, with the steps, the figures and the cure.
    """
    point = curve[-1]
    # A gradient that was 0 from the start is a method that is not applied: `unmoved` says so.
    if point.grad_norm == 0.0 < curve[0].grad_norm and point.loss > LEARNED:
        raise DivergedError(
            f"the gradient is exactly 0 from step {point.step} on while the loss is "
            f"{point.loss:.4f}: the weights have run away; lower train.learning_rate "
            f"(here {point.learning_rate:.2e})"
        )
    start, of_what, margin = median_loss(curve[:WINDOW]), "of the first steps", STRETCH_MARGIN
    if chance is not None and chance <= start * GUESSING_MARGIN:
        start, of_what, margin = chance, "of guessing", GUESSING_MARGIN
    for steps, limit in ((WINDOW, start * WINDOW_MARGIN), (STRETCH, start * margin)):
        if len(curve) < warmup + WINDOW + steps:
            return
        recent, before = curve[-steps:], curve[-2 * steps : -steps]
        now = median_loss(recent)
        if now > limit and now > FALLING * median_loss(before or curve[:WINDOW]):
            rate = max(point.learning_rate for point in curve)
            raise DivergedError(
                f"diverged: the median loss of steps {recent[0].step} to {recent[-1].step} is "
                f"{now:.4f}, above the {start:.4f} {of_what}, at a learning rate of {rate:.2e}: "
                f"lower train.learning_rate (try {rate / 4:.1e}) or raise train.warmup_ratio"
            )


def median_loss(points: list[CurvePoint]) -> float:
    """The middle loss: one hard batch does not move it."""
    return statistics.median(point.loss for point in points)


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
