"""A deep model is its first blocks many times over: what a few cost tells what all cost.

Works on the model that a method has built, so a method that treats blocks differently (the last
two, every other) shows as several runs of blocks that are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from tasks.train.loss import unwrapped

#: Blocks of a run that are looked at; one more gives what each further one adds.
FEW = 2


@dataclass(frozen=True)
class Stack:
    """The blocks of a model. runs: lengths of stretches of blocks that are alike."""

    parent: nn.Module
    name: str
    blocks: list[nn.Module]
    runs: list[int]

    @contextmanager
    def cut(self, kept: Sequence[int]) -> Iterator[None]:
        """The model with the first `kept` blocks of each run alone."""
        chosen, start = [], 0
        for length, count in zip(self.runs, kept, strict=True):
            chosen += self.blocks[start : start + count]
            start += length
        whole = getattr(self.parent, self.name)
        setattr(self.parent, self.name, nn.ModuleList(chosen))
        try:
            yield
        finally:
            setattr(self.parent, self.name, whole)


@contextmanager
def cut(stacks: list[Stack], kept: list[int]) -> Iterator[None]:
    """The model with the first `kept` blocks of each run of each of its stacks alone."""
    counts = iter(kept)
    with ExitStack() as cuts:
        for stack in stacks:
            cuts.enter_context(stack.cut([next(counts) for _ in stack.runs]))
        yield


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stack of blocks, or that of an encoder and that of its decoder."""
    inner = unwrapped(model)
    pair = inner.config.is_encoder_decoder
    parts = (inner.get_encoder(), inner.get_decoder()) if pair else (model,)
    return [stack for stack in map(stack_of, parts) if stack is not None]


def stack_of(model: nn.Module) -> Stack | None:
    """The longest list of modules of one class."""
    found: list[tuple[int, nn.Module, str, list[nn.Module]]] = []
    for parent in model.modules():
        for name, child in parent.named_children():
            blocks = list(child) if type(child) is nn.ModuleList else []
            if len({type(block) for block in blocks}) == 1:
                found.append((len(blocks), parent, name, blocks))
    if not found:
        return None
    _, parent, name, blocks = max(found, key=lambda entry: entry[0])
    runs = [len(list(group)) for _, group in groupby(map(_likeness, blocks))]
    return Stack(parent, name, blocks, runs)


def plans(runs: list[int]) -> list[tuple[list[int], float]]:
    """Which blocks to keep in which passes, and how often each pass counts in the sum.

    A linear rule: the cost of all is that of the few, and for each run what one block more adds
    times the blocks that are left.
    """
    few = [min(length, FEW) for length in runs]
    longer = [number for number, length in enumerate(runs) if length > FEW]
    made: list[tuple[list[int], float]] = []
    rest = 1.0
    for number in longer:
        times = float(runs[number] - few[number])
        made.append(([n + (i == number) for i, n in enumerate(few)], times))
        rest -= times
    return [(few, rest), *made]


def _likeness(block: nn.Module) -> Any:
    weights = tuple(
        (name, tuple(weight.shape), weight.dtype, weight.requires_grad)
        for name, weight in block.named_parameters()
    )
    return type(block), getattr(block, "attention_type", None), weights
