"""LoRA: W + (alpha / rank) B A, with B and A of low rank. Hu et al. 2021, arXiv:2106.09685.

A is drawn, B is zero, so that training starts from the base exactly. For a linear layer of
shape (out, in) it trains rank * (in + out) weights; for classification the head learns too.
"""

from __future__ import annotations

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from schemas.errors import Problem, UserError
from schemas.recipe import Lora
from tasks.methods.method import Method, adapted, head_parameters, task_settings
from tasks.methods.targets import linear_targets


def build(model: PreTrainedModel, candidate: Lora, task: str) -> nn.Module:
    """The model wrapped by PEFT, with A and B (and the head) in float32 and the rest frozen.

    Raises:
        UserError: a target that matches no linear layer, or a rank that a target cannot have.
    """
    targets = checked_targets(model, candidate)
    config = LoraConfig(
        **task_settings(model, task),
        r=candidate.rank,
        lora_alpha=candidate.alpha,
        lora_dropout=candidate.dropout,
        target_modules=sorted(targets),
    )
    return adapted(model, config, "candidates[method=lora]")


def trainable_parameters(model: nn.Module, candidate: Lora, task: str) -> int:
    """rank * (in + out) for every target, and the head."""
    adapters = sum(
        candidate.rank * (layer.in_features + layer.out_features)
        for layer in linear_targets(model, candidate.target_modules).values()
    )
    return adapters + head_parameters(model, task)


def checked_targets(model: nn.Module, candidate: Lora) -> dict[str, nn.Linear]:
    """The linear layers to adapt, by full name; every one of them can hold the rank."""
    targets = linear_targets(model, candidate.target_modules)
    smallest = min(min(layer.in_features, layer.out_features) for layer in targets.values())
    if candidate.rank <= smallest:
        return targets
    narrow = [
        name.rsplit(".", 1)[-1]
        for name, layer in targets.items()
        if min(layer.in_features, layer.out_features) < candidate.rank
    ]
    raise UserError(
        Problem(
            "candidates[method=lora].rank",
            f"{candidate.rank}, but {', '.join(sorted(set(narrow)))} of this base are only "
            f"{smallest} wide",
            f"choose a rank of at most {smallest}, or other target_modules",
        )
    )


METHOD = Method(
    name="lora",
    paper="arXiv:2106.09685",
    family="reparameterisation",
    merges=True,
    tasks=("causal-lm", "sequence-classification"),
    trained_base=False,
    format="peft-adapter",
    build=build,
    trainable_parameters=trainable_parameters,
)
