"""Zero-shot: the base as it is, asked with the prompt alone. Nothing is trained.

Brown et al. 2020, arXiv:2005.14165. A candidate like any other, so that a recipe can select and
register it where nothing that was tuned is better.
"""

from __future__ import annotations

from torch import nn

from schemas.candidates import PromptBase
from tasks.methods.method import Method


def build(model: nn.Module, candidate: PromptBase, task: str) -> nn.Module:
    """The model itself, all of it frozen."""
    return model.requires_grad_(False)


def trainable_parameters(model: nn.Module, candidate: PromptBase, task: str) -> int:
    return 0


METHOD = Method(
    name="zero_shot",
    paper="arXiv:2005.14165",
    family="none",
    merges=False,
    tasks=("causal-lm", "seq2seq"),
    trained_base=False,
    format="prompt",
    builder=build,
    trainable_parameters=trainable_parameters,
)
