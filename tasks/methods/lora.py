"""LoRA: W + (alpha / rank) B A, with B and A of low rank. Hu et al. 2021, arXiv:2106.09685.

A is drawn, B is zero, so that training starts from the base exactly. For a linear layer of
shape (out, in) it trains rank * (in + out) weights; for classification the head learns too.

Of its variants: rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732), DoRA
learns each row's length apart (Liu et al. 2024, arXiv:2402.09353), LoRA+ gives B a higher rate
(Hayou et al. 2024, arXiv:2402.12354); PiSSA and OLoRA start elsewhere
(`tasks/methods/residual.py`).
"""

from __future__ import annotations

import re

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from schemas.candidates import Lora, LoraBase
from schemas.errors import Problem, UserError
from tasks.methods.method import Method, head_parameters, place, task_settings
from tasks.methods.residual import PEFT_NAMES, ResidualCourse
from tasks.methods.targets import linear_targets


def config(model: PreTrainedModel, candidate: LoraBase, task: str) -> LoraConfig:
    """What PEFT is told.

    Raises:
        UserError: a target that matches no linear layer, or a rank that a target cannot have.
    """
    ranks = checked_ranks(model, candidate)
    # Shapes alone have no singular values.
    shapes_only = next(model.parameters()).is_meta
    start = candidate.init if isinstance(candidate, Lora) and not shapes_only else "default"
    return LoraConfig(
        **task_settings(model, task),
        r=candidate.rank,
        lora_alpha=candidate.alpha,
        lora_dropout=candidate.dropout,
        target_modules=sorted(ranks),
        # By full name; PEFT reads each as a regular expression for the name's end.
        rank_pattern={
            re.escape(name): rank for name, rank in ranks.items() if rank != candidate.rank
        },
        use_rslora=candidate.rslora,
        use_dora=candidate.dora,
        init_lora_weights=PEFT_NAMES[start],
    )


def trainable_parameters(model: nn.Module, candidate: LoraBase, task: str) -> int:
    """rank * (in + out) for every target, with DoRA out more for the lengths, and the head."""
    ranks = checked_ranks(model, candidate)
    layers = linear_targets(model, candidate.target_modules)
    own = sum(
        ranks[name] * (layer.in_features + layer.out_features)
        + (layer.out_features if candidate.dora else 0)
        for name, layer in layers.items()
    )
    return own + head_parameters(model, task)


def shipped_parameters(model: nn.Module, candidate: Lora, task: str) -> int:
    """What is trained; of a start elsewhere twice the rank (`tasks/methods/residual.py`)."""
    count = trainable_parameters(model, candidate, task)
    if candidate.init == "default":
        return count
    ranks = checked_ranks(model, candidate)
    layers = linear_targets(model, candidate.target_modules)
    widths = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    return count + sum(ranks[name] * width for name, width in widths.items())


def rate_of(candidate: LoraBase, name: str) -> float:
    """LoRA+: what the learning rate of a weight is multiplied with."""
    return candidate.b_rate if ".lora_B." in name else 1.0


def checked_ranks(model: nn.Module, candidate: LoraBase) -> dict[str, int]:
    """The rank of each linear layer to adapt, by full name.

    Raises:
        UserError: a name in `ranks` that is no target, or a rank that a layer is too narrow for.
    """
    targets = linear_targets(model, candidate.target_modules)
    ranks = dict.fromkeys(targets, candidate.rank)
    problems = []
    for ending, rank in candidate.ranks.items():
        chosen = [name for name in targets if f".{name}".endswith(f".{ending}")]
        ranks.update(dict.fromkeys(chosen, rank))
        if not chosen:
            known = sorted({name.rsplit(".", 1)[-1] for name in targets})
            problems.append(
                Problem(
                    f"{place(candidate)}.ranks",
                    f"{ending} is none of the layers in target_modules",
                    f"choose from {', '.join(known)}",
                )
            )
    widths = {name: min(layer.in_features, layer.out_features) for name, layer in targets.items()}
    narrow = [name for name in targets if ranks[name] > widths[name]]
    if narrow:
        smallest = min(widths[name] for name in narrow)
        named = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in narrow}))
        problems.append(
            Problem(
                f"{place(candidate)}.rank",
                f"{max(ranks[name] for name in narrow)}, but {named} of this base are only "
                f"{smallest} wide",
                f"choose a rank of at most {smallest}, or other target_modules",
            )
        )
    if problems:
        raise UserError(problems)
    return ranks


METHOD = Method(
    name="lora",
    paper="arXiv:2106.09685",
    family="reparameterisation",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    rate_of=rate_of,
    course=ResidualCourse,
    ships=shipped_parameters,
)
