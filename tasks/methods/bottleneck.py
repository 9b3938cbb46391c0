"""Bottleneck adapters: two small layers with a nonlinearity between, inside every block.

Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; He et al. 2022,
arXiv:2110.04366. PEFT has none: `tasks/methods/tuners/bottleneck.py` is such a tuner. Of a block
of width d and an adapter of width b = d // reduction_factor it trains 2 d b + b + d weights; for
classification the head learns too. It starts at the base exactly, and cannot be merged.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from schemas.candidates import Bottleneck
from tasks.methods.method import Method, head_parameters, refused, task_settings
from tasks.methods.tuners import bottleneck

PLACE = "candidates[method=bottleneck]"


def trainable_parameters(model: nn.Module, candidate: Bottleneck, task: str) -> int:
    """2 d b + b + d for each adapter, and the head."""
    try:
        widths = bottleneck.target_widths(model, config(model, candidate, task))
    except ValueError as error:
        raise refused(error, PLACE) from error
    own = bottleneck.count(widths.values(), candidate.reduction_factor)
    return own + head_parameters(model, task)


def config(model: nn.Module, candidate: Bottleneck, task: str) -> bottleneck.BottleneckConfig:
    """What PEFT is told. Its tuner says what of it cannot be on a base."""
    fields = candidate.model_dump(exclude={"name", "train", "method"})
    return bottleneck.BottleneckConfig(**task_settings(model, task), **fields)


METHOD = Method(
    name="bottleneck",
    paper="arXiv:1902.00751",
    family="additive",
    merges=False,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    tuner=Path(bottleneck.__file__),
)
