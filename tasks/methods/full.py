"""Full fine-tuning: every weight of the base learns. The yardstick of every other method.

The weights stay in float32 while they learn (bfloat16 has 8 bits of mantissa: an update under
1/256 of a weight would vanish) and the products run in the recipe's dtype under autocast.
"""

from __future__ import annotations

from torch import nn

from schemas.candidates import Full
from tasks.methods.method import Method, count_parameters, to_float32, trained


def build(model: nn.Module, candidate: Full, task: str) -> nn.Module:
    """The model itself, all of it trainable and in float32."""
    model.requires_grad_(True)
    to_float32(trained(model))
    return model


def trainable_parameters(model: nn.Module, candidate: Full, task: str) -> int:
    return count_parameters(model)


METHOD = Method(
    name="full",
    paper="none: ordinary fine-tuning",
    family="none",
    merges=False,
    trained_base=True,
    format="transformers",
    builder=build,
    trainable_parameters=trainable_parameters,
)
