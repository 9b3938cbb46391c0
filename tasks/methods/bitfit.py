"""BitFit: the model's own biases learn, all else is frozen.

Ben Zaken et al. 2022, arXiv:2106.10199. PEFT has no such tuner (`bias="all"` trains LoRA's weights
too): `tasks/methods/tuners/bitfit.py` is one. It trains as many weights as the base has biases
outside its heads; for classification the head learns too.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from schemas.candidates import BitFit
from schemas.errors import UserError
from tasks.core.models import head_modules
from tasks.methods.method import Method, head_parameters, task_settings
from tasks.methods.tuners import bitfit

PLACE = "candidates[method=bitfit]"


def config(model: nn.Module, candidate: BitFit, task: str) -> bitfit.BitFitConfig:
    """What PEFT is told.

    Raises:
        UserError: the base has no bias.
    """
    if own_biases(model) == 0:
        raise UserError.at(
            PLACE,
            f"{type(model).__name__} has no bias outside its heads, so BitFit has nothing to train",
            "use method: layer_norm or method: lora, which need none",
        )
    return bitfit.BitFitConfig(**task_settings(model, task))


def trainable_parameters(model: nn.Module, candidate: BitFit, task: str) -> int:
    """Every bias outside the heads, and the head that the task needs anew."""
    return own_biases(model) + head_parameters(model, task)


def own_biases(model: nn.Module) -> int:
    """Weights of all biases outside the heads."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = tuple(f"{head}." for head in head_modules(model))
    found = 0
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        if bias is not None and module is not output and not f"{name}.".startswith(heads):
            found += bias.numel()
    return found


METHOD = Method(
    name="bitfit",
    paper="arXiv:2106.10199",
    family="selective",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    tuner=Path(bitfit.__file__),
)
