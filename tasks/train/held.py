"""What the memory of a training run was for, counted from its own tensors.

Counted when the run is over and its peak is known, so that no weight, random number or time of
it depends on the counting. It costs one forward pass, over the run's largest micro-batch.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from tasks.core.plan import Rows
from tasks.core.runtime import tensor_bytes
from tasks.train.batching import held_tokens
from tasks.train.loop import Job
from tasks.train.memory import MIB, saved_bytes
from tasks.train.pairs import held_lengths


def parts_mib(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    job: Job,
    peak_mib: float,
) -> dict[str, float]:
    """The peak's parts, MiB, by their names in `schemas.report.Memory`.

    The parts are not all there at once: gradients come as activations go. Where they are large
    the rest, which is the peak without the parts, is below 0.
    """
    state = chain.from_iterable(each.values() for each in optimizer.state.values())
    batch = job.batch(largest_micro_batch(job)).to(job.accelerator.device)
    with job.accelerator.autocast():
        activations = saved_bytes(model, batch, job.dtype)
    parts = {
        "weights": tensor_bytes(chain(model.parameters(), model.buffers())),
        # Autograd gives each weight that learns a gradient of its own shape and dtype.
        "gradients": tensor_bytes(weights.values()),
        "optimiser": tensor_bytes(value for value in state if isinstance(value, torch.Tensor)),
        "activations": activations,
    }
    held = {f"train_{name}_mib": count / MIB for name, count in parts.items()}
    return held | {"train_rest_mib": peak_mib - sum(held.values())}


def largest_micro_batch(job: Job) -> Rows:
    """The rows of the micro-batch, of the whole run, that holds the most tokens."""
    lengths, per_epoch = held_lengths(job.rows, job.task), job.plan.steps_per_epoch
    steps = (
        rows
        for epoch in range(-(-job.steps // per_epoch))
        for rows in job.plan.epoch(epoch)[: job.steps - epoch * per_epoch]
    )
    parts = (part for rows in steps for part in job.micro_batches(rows))
    return max(parts, key=lambda part: held_tokens(lengths[part], job.layout))
