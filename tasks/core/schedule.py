"""The learning rate as a function of the step alone, so that there is no state to restore."""

from __future__ import annotations

import math

from schemas.recipe import Train


def warmup_steps(train: Train, total_steps: int) -> int:
    return round(train.warmup_ratio * total_steps)


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then linear, cosine or constant.

    The first step's rate is not 0 and the last one's is not 0: no step is wasted.
    """
    warmup = warmup_steps(train, total_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    if train.schedule == "linear":
        return train.learning_rate * (1 - done)
    if train.schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return train.learning_rate


def total_steps(train: Train, steps_per_epoch: int) -> int:
    """Optimiser steps of the whole run, at least one."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, round(train.epochs * steps_per_epoch))
