"""What a training run computed, counted from its own operations when it is over."""

from __future__ import annotations

from torch import nn

from tasks.core.flops import FlopCounter
from tasks.train.held import largest_micro_batch
from tasks.train.loop import Job
from tasks.train.loss import loss_sum


def flops_per_token(model: nn.Module, job: Job) -> float:
    """FLOPs of the run's largest micro-batch there and back, by its real tokens. With what the
    run adds to the bare model: attention over packed rows, recomputed blocks, padding.

    It costs that pass once more, and leaves no gradient behind.
    """
    batch = job.batch(largest_micro_batch(job)).to(job.accelerator.device)
    counter = FlopCounter()
    with counter:
        with job.accelerator.autocast():
            loss = loss_sum(model, batch, job.dtype)
        loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return float(counter.flops / batch.tokens)
