"""From a dry run to the memory of a process: what training holds, and what serving holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from schemas.recipe import Evaluate
from schemas.tasks import is_encoder_decoder, is_labelled
from tasks.core.runtime import TORCH_DTYPES, Dtype
from tasks.cost import four_bits
from tasks.cost.dry import DryRun
from tasks.methods import soft
from tasks.methods.method import trained
from tasks.train import heap

MIB = 2**20
#: What a process on a CPU holds beside its tensors, MiB, without and with checkpointing: code and
#: modules that loading brings in, MKL's workspace, the heap's stock (`tasks/train/heap.py`), and
#: without checkpointing holes in the heap. Set by LoRA on two bases and BitFit (docs/plan.md).
PROCESS_MIB = {"float32": (126, 77), "bfloat16": (85, 64)}
#: With checkpointing a block's tensors come and go among those that stay, and leave holes: a share
#: of all that lives, set by LoRA in float32 on two bases. Tensors from `heap.OWN_MAPPING` on leave
#: none, and of a base so large that most are of that size nothing was measured: no more than of
#: so many MiB.
HOLES, HOLES_UP_TO_MIB = 0.16, 1100
#: What oneDNN keeps of a product, whatever its shape: 0.54 to 0.59 MiB of descriptions, and 0.01 to
#: 0.22 of code (docs/plan.md).
PRODUCT_MIB = 0.6
#: AdamW's two moments, and a gradient, in float32.
MOMENTS, GRADIENT = 8, 4


def training(model: nn.Module, dry: DryRun, dtype: Dtype, checkpointing: bool) -> dict[str, float]:
    """The peak, split by what holds it at that moment. MiB."""
    learned = sum(weight.numel() for weight in trained(model).values())
    # The ledger's peak has what there is of them. The split: every gradient is there once a
    # backward pass ends and all through a later one of the step, none before the first.
    gradients = min(GRADIENT * learned, dry.peak) if dry.with_gradients else 0.0
    parts = {
        "weights": weight_bytes(model.parameters()) / MIB,
        "gradients": gradients / MIB,
        "optimiser": MOMENTS * learned / MIB,
        "method": dry.kept / MIB,
        "activations": (dry.peak - gradients) / MIB,
    }
    holes = HOLES * min(sum(parts.values()), HOLES_UP_TO_MIB) if checkpointing else 0.0
    parts["rest"] = PROCESS_MIB[dtype][checkpointing] + holes + products_mib(dry)
    return {**parts, "total": sum(parts.values())}


def products_mib(dry: DryRun) -> float:
    """What the peak has of the products that oneDNN keeps. MiB.

    Each new shape of a micro-batch brings all of a pass once more, until `PRODUCTS` are kept. The
    peak is the largest sum of these and of a pass that runs when there are so many: of the largest
    pass alone where it comes late, and no more than that where it comes early.
    """
    most = float(heap.PRODUCTS)
    if dry.load.met is None:  # Rows of unknown lengths have many shapes.
        return PRODUCT_MIB * most * bool(dry.compiled.both)
    return max(
        PRODUCT_MIB * min(most, dry.compiled.after(shapes)) - (1 - share) * dry.peak / MIB
        for shapes, share in dry.load.met.items()
    )


def weight_bytes(weights: Iterable[torch.Tensor]) -> int:
    """Of weights and, where they are packed, of their scales."""
    return sum(
        part.numel() * part.element_size()
        for weight in weights
        for part in (weight, *four_bits.scales(weight))
    )


def inference(
    model: nn.Module,
    config: Any,
    task: str,
    evaluate: Evaluate,
    dtype: Dtype,
    shipped: float,
    before: float = 0.0,
) -> float:
    """The base and what is shipped, and at evaluate's largest batch keys and values and the logits
    of one position. MiB.

    A classifier keeps no keys and values. Activations of a layer are left out.

    shipped: bytes. before: tokens in front of each prompt.
    """
    frozen = (weight for weight in model.parameters() if not weight.requires_grad)
    held = weight_bytes(frozen) + shipped
    if is_labelled(task):
        return held / MIB
    rows, item = max(evaluate.batch_sizes), TORCH_DTYPES[dtype].itemsize
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    tokens = rows * (before + max(evaluate.prompt_lengths) + evaluate.max_new_tokens)
    layers = config.num_hidden_layers
    if is_encoder_decoder(task):
        # Of the prompts a decoder keeps keys and values too, for its attention to the encoder,
        # and all of what that has made of them.
        layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        read = max(evaluate.prompt_lengths) + (0 if soft.is_cache(model) else before)
        held += rows * read * config.hidden_size * item
    cache = 2 * layers * keys * width * tokens * item
    return float(held + cache + rows * config.vocab_size * 4) / MIB
