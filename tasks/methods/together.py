"""Together: several methods on one base, which learn at once, in one training.

He et al. 2022, arXiv:2110.04366 (prefix tuning in attention with an adapter beside the
feed-forward); Mao et al. 2022, arXiv:2110.07577 (LoRA, prefix tuning and adapters). Each part
wraps what the ones before it have left of the base: what is inside of linear layers, then what is
around layers, then what stands before a row (`LAYER` of its candidate). It trains what its parts
train, the head once, and starts at the base if all of them do.

What a part adapts is found on the untouched base, since what others have put into it are linear
layers too. The head belongs to the last part. PEFT freezes all but what it adds, so the rest is
made to learn again at the end.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from schemas.candidates import CandidateBase
from schemas.errors import Problem, UserError
from schemas.together import Together
from tasks.core import adapters
from tasks.core.models import head_modules
from tasks.core.quantised import Quantisation
from tasks.methods.course import Course
from tasks.methods.method import Method, head_parameters, place, trained


def build(model: PreTrainedModel, candidate: Together, task: str) -> nn.Module:
    """The last part's model, which has the others as its `parts` (`tasks/core/adapters.py`).

    Raises:
        UserError: what any part cannot have of this base, or a part that is not for this task.
    """
    pairs = pairs_of(candidate, task)
    configs: list[PeftConfig] = []
    for method, part in pairs:
        assert method.config is not None, f"{method.name} is refused by the recipe"
        with told_of(part):
            configs.append(method.config(model, part, task))
    for config in configs[:-1]:
        without_head(config, sorted(head_modules(model)))
    tuned: Any = model
    parts: list[PeftModel] = []
    learned: list[nn.Parameter] = []
    for (method, part), config in zip(pairs, configs, strict=True):
        with told_of(part), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT")
            tuned = method.wrap(adapters.wrappable(tuned), config, place(part))
        parts.append(tuned)
        learned += trained(tuned).values()
    for weight in learned:
        weight.requires_grad_(True)
    return adapters.with_parts(parts)


def trainable_parameters(model: nn.Module, candidate: Together, task: str) -> int:
    """What each part trains, and the head once."""
    total = head_parameters(model, task)
    for method, part in pairs_of(candidate, task):
        with told_of(part):
            own = method.trainable_parameters(model, part, task)
        total += own - head_parameters(model, task)
    return total


def pairs_of(candidate: Together, task: str | None = None) -> list[tuple[Method, Any]]:
    """Each part's method, and what the recipe says of it.

    Raises:
        UserError: one of them cannot be used for this task.
    """
    # Here, since the table imports this file.
    from tasks.methods.table import method_for, methods_of

    if task is not None:
        for part in candidate.of:
            with told_of(part):
                method_for(part.method, task)
    return list(zip(methods_of(candidate), candidate.of, strict=True))


def without_head(config: PeftConfig, heads: list[str]) -> None:
    """A part that leaves the head alone: the last one has it, for a classifier's soft prompt makes
    one anew whatever is there."""
    options: Any = config
    options.task_type = options.modules_to_save = None
    if heads and hasattr(config, "exclude_modules"):
        names = "|".join(map(re.escape, heads))
        options.exclude_modules = rf"(.*\.)?({names})(\..*)?"


@contextmanager
def told_of(part: CandidateBase) -> Iterator[None]:
    """Problems of a part at its place in the whole."""
    try:
        yield
    except UserError as error:
        ours = f"candidates[method=together].of[method={part.method}]"
        raise UserError(
            [
                Problem(re.sub(r"^candidates\[[^]]*\]", ours, one.place), one.found, one.fix)
                for one in error.problems
            ]
        ) from error


class TogetherCourse(Course):
    """The courses of all parts, side by side; what they keep is told apart by their numbers."""

    def __init__(self, model: nn.Module, candidate: Together, steps: int) -> None:
        super().__init__(model, candidate, steps)
        self.courses = [
            method.course(own, part, steps)
            for own, (method, part) in zip(
                adapters.parts_of(model), pairs_of(candidate), strict=True
            )
        ]

    def penalty(self) -> torch.Tensor | None:
        found = [penalty for each in self.courses if (penalty := each.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self, step: int) -> None:
        for each in self.courses:
            each.after_step(step)

    def state(self) -> dict[str, torch.Tensor]:
        return {
            f"{number}/{name}": value
            for number, each in enumerate(self.courses)
            for name, value in each.state().items()
        }

    def kept(self) -> int:
        return sum(each.kept() for each in self.courses)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for number, each in enumerate(self.courses):
            own = f"{number}/"
            each.restore(
                {name.removeprefix(own): x for name, x in state.items() if name.startswith(own)}
            )

    def finish(self) -> dict[str, Any]:
        return {name: fact for each in self.courses for name, fact in each.finish().items()}

    def export(self, adapter: Path) -> None:
        for each, own in zip(self.courses, adapters.directories(adapter), strict=True):
            each.export(own)


def rate_of(candidate: Together, name: str) -> float:
    """A weight belongs to one part; the others leave its rate as it is."""
    return math.prod(method.rate_of(part, name) for method, part in pairs_of(candidate))


def decays(name: str) -> bool:
    """Whether the method that has weights of that name lets them decay."""
    from tasks.methods.table import METHODS

    return all(method.decays(name) for method in METHODS.values() if method is not METHOD)


def quantisation(candidate: Together) -> Quantisation | None:
    """That of the part which learns beside a quantised base, if one does."""
    found = (method.quantises(part) for method, part in pairs_of(candidate))
    return next((one for one in found if one is not None), None)


METHOD = Method(
    name="together",
    paper="arXiv:2110.04366",
    family="of its parts",
    merges=False,
    trained_base=False,
    format="peft-adapter",
    builder=build,
    trainable_parameters=trainable_parameters,
    rate_of=rate_of,
    decays=decays,
    course=TogetherCourse,
    quantises=quantisation,
)
