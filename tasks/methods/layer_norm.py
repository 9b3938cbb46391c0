"""Layer-norm tuning: the weights (and biases) of the norms learn, all else is frozen.

Zhao et al. 2024, arXiv:2312.11420. A norm trains its own parameters; for classification the
head learns too. They learn in float32 and are rounded to the base's dtype when they are loaded
or merged, since layers in bfloat16 take no float32 from a norm.
"""

from __future__ import annotations

from peft import LNTuningConfig
from torch import nn

from schemas.candidates import LayerNorm
from schemas.errors import UserError
from tasks.core.models import head_modules
from tasks.methods.method import Method, count_parameters, head_parameters, task_settings

PLACE = "candidates[method=layer_norm]"


def config(model: nn.Module, candidate: LayerNorm, task: str) -> LNTuningConfig:
    """What PEFT is told.

    Raises:
        UserError: no norm has weights.
    """
    return LNTuningConfig(**task_settings(model, task), target_modules=sorted(norms(model)))


def trainable_parameters(model: nn.Module, candidate: LayerNorm, task: str) -> int:
    """All weights of all norms, and the head."""
    own = sum(count_parameters(norm) for norm in norms(model).values())
    return own + head_parameters(model, task)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms by full name: what its class calls a norm, with weights to train."""
    heads = tuple(f"{head}." for head in head_modules(model))
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith("norm")
        and next(module.parameters(), None) is not None
        and not name.startswith(heads)
    }
    if not found:
        raise UserError.at(PLACE, "this base has no norm with weights", "use method: lora or full")
    return found


METHOD = Method(
    name="layer_norm",
    paper="arXiv:2312.11420",
    family="selective",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
)
