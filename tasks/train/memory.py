"""Does the run fit? Answered before it starts, from what one small pass keeps.

Training holds: what is loaded now; for each trained weight a gradient and two Adam moments in
float32; what the largest micro-batch's forward pass keeps for its backward pass; and blocks of
logits. What is kept is measured, not guessed: autograd tells of every tensor that
it saves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from schemas.errors import UserError
from tasks.core.runtime import resident_mib
from tasks.methods import soft
from tasks.train import attention
from tasks.train.batching import Batch
from tasks.train.grids import padded
from tasks.train.loop import Job
from tasks.train.loss import BLOCK_BYTES, loss_sum, unwrapped

MIB = 2**20
#: Tokens of the pass that is measured.
PROBE_TOKENS = 256
#: Code that oneDNN compiles for the shapes of a run's products, about 1 MiB each.
KERNEL_MIB = 200


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
        # Not the tensor itself: one that its own operation saves would hold the graph, and the
        # graph it, beyond the reach of Python's collector.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The loss holds the graph, and with it every tensor, until it has been counted.
        loss = loss_sum(model, batch, dtype)
    del loss
    return total


def needed_mib(
    model: nn.Module, weights: dict[str, nn.Parameter], job: Job, device: torch.device
) -> float:
    """Peak memory of training beyond what is held now. MiB."""
    layout, virtual = job.layout, soft.virtual_tokens(model)
    lengths = job.rows.lengths + layout.virtual
    order = np.argsort(lengths, kind="stable")
    if not own_attention(model):
        # What others keep of a token grows with its row, and nothing says how: the longest.
        order = order[::-1]
    few = order[: max(1, PROBE_TOKENS // int(lengths[order[0]]))]
    batch = job.batch(few).to(device)
    counted = batch.tokens if layout.unpadded else batch.positions
    counted += layout.virtual * len(batch.input_ids_BL)
    per_token = saved_bytes(model, batch, job.dtype) / counted
    longer = float(lengths.mean() / job.rows.lengths.mean())
    tokens = max(min(layout.budget, int(job.train.batch_tokens * longer)), int(lengths.max()))
    seen = job.rows.lengths + virtual
    kept = per_token * tokens + attention_bytes(
        model, seen, int(tokens * seen.mean() / lengths.mean()), job.dtype
    )
    gradients = sum(weight.numel() for weight in weights.values()) * 4
    held = 3 * gradients + kept + 3 * BLOCK_BYTES
    return held / MIB + (KERNEL_MIB if device.type == "cpu" else 0)


def attention_bytes(
    model: nn.Module, lengths: NDArray[np.int64], tokens: int, dtype: torch.dtype
) -> float:
    """What attention keeps that grows with the square of a row: its scores, [heads, L, L]."""
    if not own_attention(model):
        return 0.0
    config = unwrapped(model).config
    longest = padded(min(int(lengths.max()), attention.LONGEST))
    # A grid may have a third more rows than it needs.
    scores = 4 / 3 * config.num_attention_heads * longest * max(tokens, longest)
    return float(config.num_hidden_layers * scores * dtype.itemsize)


def own_attention(model: nn.Module) -> bool:
    """Whether attention is `tasks/train/attention.py`'s, of which is known what it keeps."""
    return bool(unwrapped(model).config._attn_implementation == attention.NAME)


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
