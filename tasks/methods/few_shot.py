"""Few-shot: the base as it is, with train rows in front of each prompt. Nothing is trained.

Brown et al. 2020, arXiv:2005.14165. Which rows, and in which order: `tasks/core/shots.py`.
"""

from __future__ import annotations

from tasks.methods.method import Method
from tasks.methods.zero_shot import build, trainable_parameters

METHOD = Method(
    name="few_shot",
    paper="arXiv:2005.14165",
    family="none",
    merges=False,
    tasks=("causal-lm",),
    trained_base=False,
    format="prompt",
    builder=build,
    trainable_parameters=trainable_parameters,
)
