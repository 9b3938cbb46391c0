"""What a fine-tuning method states about itself, and the helpers that every method shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, TaskType, get_peft_model
from torch import nn

from schemas.errors import UserError
from schemas.manifest import ModelFormat
from schemas.tasks import is_labelled
from tasks.core.models import head_modules
from tasks.core.quantised import Quantisation
from tasks.methods.course import Course

#: PEFT's words for the tasks. It has none for images: its plain wrapper takes what the base takes.
TASK_TYPES: dict[str, TaskType | None] = {
    "causal-lm": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "sequence-classification": TaskType.SEQ_CLS,
    "token-classification": TaskType.TOKEN_CLS,
    "image-classification": None,
}

Family = Literal[
    "none", "additive", "selective", "reparameterisation", "of its type", "of its parts"
]

#: `config(model, candidate, task)`: what PEFT is told, from the base's shapes alone.
Configure = Callable[[Any, Any, str], PeftConfig]
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
    config: what PEFT is told, which then wraps a base with it. What has none cannot be one of
        several that learn together.
    builder: what builds it, where PEFT's wrapping is not all there is to it.
    settle: what is left to do once PEFT has wrapped a base.
    rate_of: from a candidate and a weight's name, what its learning rate is multiplied with.
    decays: whether weight decay, where a recipe asks for it, is meant for a weight of that name,
        which no other method has; biases and norms never decay.
    course: what it does in a run beside what the optimiser does, from the model, the candidate
        and the run's steps (`tasks/methods/course.py`).
    quantises: from a candidate, how the base is quantised beside which it learns, or None.
    replaces: whether what it trains takes the place of the base's own weights, in their dtype;
        it is then saved in that dtype, since nothing reads more of it.
    ships: the formula of what an adapter holds, where that is not what is trained.
    tuner: the file that PEFT needs to load it again, where PEFT itself lacks the method; it
        travels with the adapter.
    """

    name: str
    paper: str
    family: Family
    merges: bool
    trained_base: bool
    format: ModelFormat
    trainable_parameters: Count
    config: Configure | None = None
    builder: Build | None = None
    settle: Callable[[nn.Module], None] = lambda model: None
    rate_of: Callable[[Any, str], float] = lambda candidate, name: 1.0
    decays: Callable[[str], bool] = lambda name: True
    course: Callable[[nn.Module, Any, int], Course] = Course
    quantises: Callable[[Any], Quantisation | None] = lambda candidate: None
    replaces: bool = False
    tasks: tuple[str, ...] = tuple(TASK_TYPES)
    ships: Count | None = None
    tuner: Path | None = None

    def build(self, model: Any, candidate: Any, task: str) -> nn.Module:
        """The model with exactly the method's weights trainable, in float32.

        Raises:
            UserError: the method cannot be used on this base.
        """
        if self.config is None:
            assert self.builder is not None, self.name
            return self.builder(model, candidate, task)
        return self.wrap(model, self.config(model, candidate, task), place(candidate))

    def wrap(self, model: Any, config: PeftConfig, place: str) -> nn.Module:
        """A base wrapped by PEFT. place: where the recipe asks for it."""
        tuned = adapted(model, config, place)
        self.settle(tuned)
        return tuned


def place(candidate: Any) -> str:
    """Where a recipe asks for a candidate's method."""
    return f"candidates[method={candidate.method}]"


def adapted(model: Any, config: PeftConfig, place: str) -> nn.Module:
    """The model wrapped by PEFT, frozen but for what the method trains, which is float32.

    Raises:
        UserError: PEFT cannot apply the method to this model; `place` is where the recipe asks.
    """
    model.requires_grad_(False)
    try:
        tuned: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise refused(error, place) from error
    to_float32(trained(tuned))
    return tuned


def refused(error: ValueError, place: str) -> UserError:
    """What PEFT, or a tuner of ours, says against a model: what was found, then the fix."""
    found, _, fix = str(error).partition("; ")
    return UserError.at(place, found, fix or "choose other modules, or another method")


def task_settings(model: nn.Module, task: str) -> dict[str, Any]:
    """What every PEFT configuration is told of the task: its type, and the head to train."""
    heads = sorted(head_modules(model)) if is_labelled(task) else None
    return {"task_type": TASK_TYPES[task], "modules_to_save": heads}


def head_parameters(model: nn.Module, task: str) -> int:
    """Weights of the head that a task needs anew."""
    heads = head_modules(model).values() if is_labelled(task) else ()
    return sum(weight.numel() for head in heads for weight in head.parameters())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """Every parameter once: tied weights are one, and one of 4 bits counts as one."""
    states = [(weight, getattr(weight, "quant_state", None)) for weight in model.parameters()]
    return sum(weight.numel() if s is None else s.shape.numel() for weight, s in states)


def to_float32(weights: dict[str, nn.Parameter]) -> None:
    """Trained weights in float32, whatever the base is in: small updates vanish in bfloat16."""
    for weight in weights.values():
        weight.data = weight.data.to(torch.float32)
