"""Where and how the model runs: device, autocast, threads, attention, dropout, compilation."""

from __future__ import annotations

import torch
import torch.utils.deterministic
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from schemas.recipe import Train
from schemas.tasks import is_encoder_decoder, is_packable
from tasks.core import runtime
from tasks.methods import soft
from tasks.methods.fused import fuse_lora
from tasks.train import attention
from tasks.train.batching import Layout
from tasks.train.loss import backbone, unwrapped
from tasks.train.norm import fuse_norms
from tasks.train.rotary import fuse_rotary

#: Padded tokens of one forward pass where the recipe does not say. Few large passes: every layer
#: is dozens of kernels, and each costs a call and a barrier however small it is.
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


#: Probabilities that models keep as numbers, beside layers of their own.
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


def make_accelerator(dtype: runtime.Dtype) -> Accelerator:
    """Device and mixed precision. Autocast does nothing where all is float32.

    Accelerate keeps its choice for the life of the process; a process may train twice.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
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


def place(model: nn.Module, train: Train, device: torch.device) -> nn.Module:
    """The model on its device, in training mode, with its fused layers.

    device: meta, for shapes alone, is taken for a CPU.
    """
    model = model.to(device)
    model.train()
    without_base_dropout(model)
    if train.gradient_checkpointing:
        unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False})
    fuse_lora(model)
    if device.type in ("cpu", "meta"):
        fuse_norms(model)
        fuse_rotary(model)
    return model


def use_fast_attention(model: nn.Module, device: torch.device, longest: int, task: str) -> bool:
    """Attention that keeps packed rows apart at no cost. Whether the model can have it.

    longest: tokens of the longest row; a model that looks back over a window is let off only
        where no row is longer than it.
    """
    inner = unwrapped(model)
    window = getattr(inner.config, "sliding_window", None)
    if is_encoder_decoder(task):
        return False  # attention over another sequence, and T5's position bias, are not its own
    if not inner._supports_attention_backend or (window is not None and window < longest):
        return False
    if device.type == "cpu":
        attention.register()
        inner.set_attn_implementation(attention.NAME)
        return True
    if not is_packable(task) or soft.virtual_tokens(model):
        return False
    # From the positions of packed rows transformers makes flex attention's block mask.
    inner.set_attn_implementation("flex_attention")
    backbone(model).compile(dynamic=True)
    return True


def layout(
    train: Train,
    device: torch.device,
    packed: bool,
    pad_id: int,
    unpadded: bool,
    virtual: int = 0,
    start_id: int = 0,
) -> Layout:
    """How the rows of a step are cut into forward passes."""
    budget = train.micro_batch_tokens or MICRO_BATCH_TOKENS[device.type]
    return Layout(budget, packed, pad_id, unpadded, virtual, start_id)


def without_base_dropout(model: nn.Module) -> None:
    """Turn off the dropout that the base was pretrained with; an adapter's own is kept.

    A recipe has no word for it, banking77 did no worse without it (docs/train.md), and on a CPU
    its random numbers cost more than half as much again.
    """
    adapters = (part for part in model.modules() if isinstance(part, BaseTunerLayer))
    own = {
        id(part)
        for adapter in adapters
        for name, part in adapter.named_modules()
        if not f"{name}.".startswith("base_layer.")
    }
    for module in model.modules():
        if isinstance(module, nn.Dropout) and id(module) not in own:
            module.p = 0.0
        if type(module).__name__.endswith("DropPath"):  # whole branches of a row, in image models
            module.drop_prob = 0.0  # type: ignore[assignment]
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float) and id(module) not in own:
                setattr(module, name, 0.0)
