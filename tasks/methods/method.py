"""What a fine-tuning method states about itself, and the helpers that every method shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Family = Literal["none", "additive", "selective", "reparameterisation"]

#: `build(model, candidate, task)`: the model with exactly the method's weights trainable.
Build = Callable[[Any, Any, str], nn.Module]
#: `trainable_parameters(model, candidate, task)`: the formula, from the base's shapes alone.
Count = Callable[[nn.Module, Any, str], int]


@dataclass(frozen=True)
class Method:
    """One way to adapt a base.

    name: the `method` of a recipe's candidate.
    paper: where it comes from.
    family: what it does to the base, in the terms of Lialin et al. 2023, arXiv:2303.15647.
    merges: whether what it learned folds into the base's own weights.
    tasks: the tasks that it can be used for.
    trained_base: whether it trains the base's own weights, which then stay in float32.
    format: what its entry holds.
    """

    name: str
    paper: str
    family: Family
    merges: bool
    tasks: tuple[str, ...]
    trained_base: bool
    format: Literal["peft-adapter", "transformers"]
    build: Build
    trainable_parameters: Count


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """Every parameter once: tied weights are one."""
    return sum(weight.numel() for weight in model.parameters())


def to_float32(weights: dict[str, nn.Parameter]) -> None:
    """Trained weights in float32, whatever the base is in: small updates vanish in bfloat16."""
    for weight in weights.values():
        weight.data = weight.data.to(torch.float32)
