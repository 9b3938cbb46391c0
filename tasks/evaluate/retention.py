"""What was forgotten: the loss on text that has nothing to do with the task, beside the base's.

Shapes: N texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from schemas.recipe import Evaluate
from schemas.report import Interval
from schemas.tasks import Task, is_labelled
from tasks.core import bootstrap
from tasks.core.bootstrap import Statistic, ratio
from tasks.core.tokens import TokenRows
from tasks.evaluate.scoring import answer_losses


@dataclass(frozen=True)
class Retention:
    """Nats per token of the general text.

    loss, loss_base: the subject's and its base's.
    change: the first minus the second, text by text, so that seeds can be put together.
    interval: of the change.
    """

    loss: float
    loss_base: float
    change: Statistic
    interval: Interval


def is_measured(task: Task, prepared: Path) -> bool:
    """Whether there is general text, and a language head to read it with."""
    return not is_labelled(task) and texts_of(prepared).exists()


def measure_retention(
    model: torch.nn.Module, base: torch.nn.Module, prepared: Path, evaluate: Evaluate
) -> Retention:
    """What a model forgot of what its base knew.

    Args:
        base: the model itself where its weights are the base's.
    """
    texts = TokenRows.load(texts_of(prepared))
    before_N, tokens_N = answer_losses(base, texts, "retention of the base")
    after_N = before_N if model is base else answer_losses(model, texts, "retention")[0]
    loss, loss_base = (ratio(losses_N, tokens_N).value for losses_N in (after_N, before_N))
    change = ratio(after_N - before_N, tokens_N)
    return Retention(loss, loss_base, change, bootstrap.interval(change, evaluate.bootstrap))


def texts_of(prepared: Path) -> Path:
    return prepared / "tokens" / "retention.safetensors"
