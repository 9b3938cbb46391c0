"""Where and how the model runs: device, autocast, attention, dropout, compilation."""

from __future__ import annotations

import torch
import torch.utils.deterministic
from accelerate import Accelerator
from torch import nn

from schemas.recipe import Train
from tasks.core import runtime
from tasks.train.fused import fuse_lora
from tasks.train.loss import unwrapped

#: Padded tokens of one forward pass where the recipe does not say. On a CPU the products are
#: at full speed from about a thousand rows on, and smaller tensors stay in the caches.
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


def make_accelerator(dtype: runtime.Dtype) -> Accelerator:
    """Device and mixed precision. Autocast does nothing where all is float32."""
    return Accelerator(
        cpu=runtime.device().type == "cpu",
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
    )


def seed(seed: int) -> None:
    """Every generator and deterministic kernels, without their fill of every new tensor.

    The fill guards against reading memory that was never written. It costs a pass over every
    activation, and the resume test would see such a read as a difference.
    """
    runtime.seed_everything(seed)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def place(model: nn.Module, train: Train, accelerator: Accelerator, frozen_base: bool) -> nn.Module:
    """The model on its device, in training mode, with its fast paths chosen."""
    model = model.to(accelerator.device)
    model.train()
    if frozen_base:
        without_dropout(model)
    if train.gradient_checkpointing:
        unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
    fuse_lora(model)
    if accelerator.device.type == "cuda":
        # Packed rows: flex attention skips the blocks between them.
        unwrapped(model).set_attn_implementation("flex_attention")
        model.compile(dynamic=True)
    return model


def without_dropout(model: nn.Module) -> None:
    """Turn off the base's own dropout; an adapter's is kept.

    It regularises weights that learn. The frozen ones do not, and on a CPU it costs the fused
    attention kernel.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
