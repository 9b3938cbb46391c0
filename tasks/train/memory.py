"""Does the run fit? Answered before it starts, from what one small pass keeps.

Training holds: what is loaded now; a gradient and two Adam moments in float32 for each trained
weight; what the largest micro-batch's forward pass keeps for its backward pass, which with
fused attention is linear in its tokens; and one block of logits. The third is measured, not
guessed: autograd tells of every tensor that it saves.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from schemas.errors import UserError
from tasks.core.runtime import resident_mib
from tasks.train.batching import Batch
from tasks.train.loss import BLOCK_BYTES, loss_sum

MIB = 2**20


def saved_bytes(model: nn.Module, batch: Batch, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one batch keeps for its backward pass, weights excluded."""
    seen = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The loss holds the graph, and with it every tensor, until it has been counted.
        loss = loss_sum(model, batch, dtype)
    del loss
    return total


def needed_mib(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    probe: Batch,
    tokens: int,
    dtype: torch.dtype,
) -> float:
    """Peak memory of training with micro-batches of `tokens` padded tokens, beyond what is held.

    probe: a batch that is small but not tiny.
    """
    per_token = saved_bytes(model, probe, dtype) / probe.input_ids_BL.numel()
    trained_bytes = sum(weight.numel() for weight in weights.values()) * 4
    return (3 * trained_bytes + per_token * tokens + 3 * BLOCK_BYTES) / MIB


def available_mib(device: torch.device) -> float:
    """Memory that can still be taken: the device's, or the machine's within our cgroup. MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    free = int(fields["MemAvailable"].split()[0]) / 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) / MIB - resident_mib())
    return free


def check_fits(needed: float, available: float, checkpointing: bool) -> None:
    """Raise a UserError where a run needs more than there is."""
    if needed <= available:
        return
    fixes = ["lower train.micro_batch_tokens"]
    if not checkpointing:
        fixes.append("set train.gradient_checkpointing: true")
    raise UserError.at(
        "train",
        f"needs about {needed:,.0f} MiB more memory, and {available:,.0f} MiB are free",
        ", or ".join([*fixes, "choose a smaller base or a method that trains less"]),
    )
