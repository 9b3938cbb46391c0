"""What a method does in the course of training beside what the optimiser does: by default nothing.

AdaLoRA adds to the loss and gives ranks away between steps; PiSSA remembers where it started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


class Course:
    """One run of one method, made when its model is where it trains and its steps are known.

    steps: optimiser steps of the whole run.
    """

    def __init__(self, model: nn.Module, candidate: Any, steps: int) -> None:
        self.model, self.candidate, self.steps = model, candidate, steps

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss of a step, once, for the gradients alone."""
        return None

    def after_step(self, step: int) -> None:
        """After the optimiser's step of that number, from 1; the gradients are still there."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint has to hold beside the trained weights and the optimiser."""
        return {}

    def kept(self) -> int:
        """Bytes that it keeps through the run beside weights and optimiser."""
        return sum(value.numel() * value.element_size() for value in self.state().values())

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` gave."""

    def finish(self) -> dict[str, Any]:
        """Facts for the train entry. Raises a StageError for a method that did not do its work."""
        return {}

    def export(self, adapter: Path) -> None:
        """Make a saved adapter one on the base as the user has it."""
