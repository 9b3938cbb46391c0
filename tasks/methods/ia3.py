"""IA3: keys and values, and what the feed-forward's last layer reads, times learned vectors.

Liu et al. 2022, arXiv:2205.05638. The vectors start at one, so that training starts from the
base exactly. A scaled output trains as many weights as it has, a scaled input likewise; for
classification the head learns too.
"""

from __future__ import annotations

from peft import IA3Config
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
from torch import nn
from transformers import PreTrainedModel

from schemas.errors import UserError
from schemas.recipe import Ia3
from tasks.methods.method import Method, adapted, head_parameters, task_settings
from tasks.methods.targets import linear_targets

PLACE = "candidates[method=ia3]"


def build(model: PreTrainedModel, candidate: Ia3, task: str) -> nn.Module:
    """The model wrapped by PEFT, with its vectors (and the head) in float32 and the rest frozen.

    Raises:
        UserError: a base whose usual modules are not known, or a name that matches none.
    """
    outputs, inputs = scaled(model, candidate)
    config = IA3Config(
        **task_settings(model, task),
        target_modules=sorted({**outputs, **inputs}),
        feedforward_modules=sorted(inputs),
    )
    return adapted(model, config, PLACE)


def trainable_parameters(model: PreTrainedModel, candidate: Ia3, task: str) -> int:
    """The width of every output and input that is scaled, and the head."""
    outputs, inputs = scaled(model, candidate)
    vectors = sum(layer.out_features for layer in outputs.values())
    vectors += sum(layer.in_features for layer in inputs.values())
    return vectors + head_parameters(model, task)


def scaled(
    model: PreTrainedModel, candidate: Ia3
) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """The layers whose outputs, and those whose inputs are scaled, by full name."""
    kind = model.config.model_type
    targets, inside = candidate.target_modules, candidate.feedforward_modules
    if targets is None:
        if kind not in TARGETS:
            raise UserError.at(
                f"{PLACE}.target_modules",
                f"not given, and what is usual for a {kind} base is not known",
                "name the layers of keys and values, and feedforward_modules for the last of the "
                "feed-forward",
            )
        targets, inside = TARGETS[kind], FEEDFORWARD[kind]
    inputs = linear_targets(model, list(inside)) if inside else {}
    outputs = linear_targets(model, [name for name in targets if name not in (inside or ())])
    return outputs, inputs


METHOD = Method(
    name="ia3",
    paper="arXiv:2205.05638",
    family="additive",
    merges=True,
    tasks=("causal-lm", "sequence-classification"),
    trained_base=False,
    format="peft-adapter",
    build=build,
    trainable_parameters=trainable_parameters,
)
