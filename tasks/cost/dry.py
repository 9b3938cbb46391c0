"""One training step of a candidate on shapes alone: what it keeps, its peak, its FLOPs.

The step is the train stage's own: its fused layers, its attention over packed rows, its loss by
blocks, its checkpointing, whatever the method has built. Only the numbers are missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.recipe import Train
from schemas.tasks import is_packable, reads_images
from tasks.core.runtime import TORCH_DTYPES, Dtype
from tasks.cost import four_bits
from tasks.cost.blocks import cut, plans, stacks_of
from tasks.cost.hollow import CPU, META, Hollow
from tasks.cost.ledger import Ledger, Product
from tasks.cost.rows import FullRow, Load, load_of, longest_of, sides_of
from tasks.methods import soft
from tasks.methods.course import Course
from tasks.methods.method import trained
from tasks.train import placement
from tasks.train.batching import Batch
from tasks.train.loss import backbone, loss_sum
from tasks.train.pairs import batch_of
from tasks.train.unpad import unpad


@dataclass(frozen=True)
class Pass:
    """One micro-batch there and back. Bytes are without weights and moments.

    kept: held between forward and backward. forward, early, late: peaks of the forward pass and
    of the two halves of the backward pass, of which the second ends with every gradient.
    """

    forward_flops: float
    backward_flops: float
    kept: float
    forward: float
    early: float
    late: float

    @property
    def peak(self) -> float:
        return max(self.forward, self.early, self.late)

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def times(self, factor: float) -> Pass:
        return Pass(*(value * factor for value in _values(self)))


@dataclass
class Compiled:
    """The different products of a pass that oneDNN compiles: of its forward half, and of both.
    Blocks that are alike have the same ones, so those of a few are those of all."""

    forward: set[Product] = field(default_factory=set)
    both: set[Product] = field(default_factory=set)

    def after(self, shapes: int) -> int:
        """How many there are after passes over so many micro-batches of different shapes. The
        train stage's probes come first, passes over rows that are too few for anything of
        theirs but products of two matrices to count."""
        matrices = sum(max(len(shape) for shape, _ in of) == 2 for _, of in self.forward)
        return PROBES * matrices + shapes * len(self.both)


@dataclass(frozen=True)
class DryRun:
    """A micro-batch's pass, its real tokens, and what the whole run has to do.

    step_flops: once a step, beside its micro-batches. kept: bytes that the method keeps all along
    beside weights and optimiser. later: a pass beside the gradients of an earlier one of its step,
    these counted; None where there is none, or these are too few to count. compiled: of `cost`.
    """

    cost: Pass
    tokens: int
    load: Load
    step_flops: float = 0.0
    kept: int = 0
    later: Pass | None = None
    compiled: Compiled = field(default_factory=Compiled)

    @property
    def peak(self) -> float:
        """Bytes without weights and moments."""
        return max(self.cost.peak, self.later.peak if self.later else 0.0)

    @property
    def with_gradients(self) -> bool:
        """Whether all of a step's gradients are part of the peak."""
        return self.cost.late >= self.peak or self.cost.peak < self.peak


#: Makes a method's course from the steps of the run.
MakeCourse = Callable[[int], Course]
#: Steps where the rows are not known yet.
MANY_STEPS = 1000
#: Of a peak: gradients that are a smaller share are not looked for beside a later micro-batch,
#: which is no larger than the largest, at the price of another pass.
FEW_GRADIENTS = 0.01
#: Passes forward of the train stage's probes, of four different numbers of tokens
#: (`tasks/train/probe.py`, `tasks/train/memory.py`): two rows, the two together, and a micro-batch.
PROBES = 4


def dry_run(
    model: nn.Module,
    task: str,
    train: Train,
    dtype: Dtype,
    prepared: Path | None,
    full: FullRow,
    course_of: MakeCourse,
) -> DryRun:
    """Run one step of a model that a method has built on meta. Changes the model.

    prepared: of the prepare stage; None: full rows are taken.

    Raises:
        UserError: what training would refuse: rows without room behind virtual tokens,
            checkpointing that would lose these, too few steps for a method.
    """
    placement.place(model, train, META)
    longest = longest_of(prepared, full.tokens)
    soft.check_room(model, *sides_of(prepared, task, full.tokens))
    fast = placement.use_fast_attention(model, CPU, longest, task)
    packed = fast and is_packable(task)
    if train.gradient_checkpointing and not packed:
        soft.check_checkpointing(model)
    whole = packed or soft.is_cache(model)
    padded = not whole and not reads_images(task)
    unpadded = fast and padded and unpad(backbone(model))
    virtual = 0 if soft.is_cache(model) else soft.virtual_tokens(model)
    layout = placement.layout(train, CPU, packed, 0, unpadded, virtual)
    load = load_of(prepared, task, train, layout, full)
    batch = batch_of(load.rows, load.micro_batch, task, layout)
    without_numbers(model)
    compiled = Compiled()
    cost, later = whole_pass(model, batch, dtype, compiled=compiled), None
    gradients = sum(weight.nbytes for weight in trained(model).values())
    if load.later is not None and gradients > FEW_GRADIENTS * cost.peak:
        again = batch_of(load.rows, load.later, task, layout)
        later = whole_pass(model, again, dtype, accumulates=True)
    course = course_of(load.steps or MANY_STEPS)
    step_flops, late = _penalty(model, course)
    cost = replace(cost, late=max(cost.late, late))
    return DryRun(cost, batch.tokens, load, step_flops, course.kept(), later, compiled)


def whole_pass(model: nn.Module, batch: Batch, dtype: Dtype, **of_each: Any) -> Pass:
    """A pass through all blocks, from those of a few. of_each: what `_pass` takes too."""
    stacks = stacks_of(model)
    total = Pass(0, 0, 0, 0, 0, 0)
    for kept, times in plans([length for stack in stacks for length in stack.runs]):
        with cut(stacks, kept):
            total += _pass(model, batch, dtype, **of_each).times(times)
    return total


def _penalty(model: nn.Module, course: Course) -> tuple[float, float]:
    """FLOPs of what a method adds to a step's loss, and the peak while it does, with every
    gradient of the step there. Bytes."""
    ledger = Ledger([*model.parameters(), *model.buffers()])
    with ledger:
        for weight in trained(model).values():
            weight.grad = torch.zeros_like(weight)
        penalty = course.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
    peak = max(ledger.history, default=0)
    for weight in model.parameters():
        weight.grad = None
    return ledger.flops, 0.0 if penalty is None else float(peak)


def without_numbers(model: nn.Module) -> None:
    """Weights on meta become hollow ones, so that autocast and kernels take them for real;
    tied ones stay tied. Of PEFT's tuners some keep tensors in plain dictionaries of a module."""
    # Both of a pair are kept: an id is free again when its tensor is gone.
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for slots in [held for held in vars(module).values() if isinstance(held, dict)]:
            for name, tensor in slots.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if id(tensor) not in made:
                    hollow = four_bits.with_scales(_hollow(tensor), tensor, _hollow)
                    made[id(tensor)] = tensor, hollow
                slots[name] = made[id(tensor)][1]
        if isinstance(module, nn.RNNBase):  # it holds its weights in a list too
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    if soft.virtual_tokens(model):
        peft: Any = model
        peft.prompt_tokens = {
            name: torch.arange(len(ids)) for name, ids in peft.prompt_tokens.items()
        }


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    hollow = Hollow(torch.empty(tensor.shape, dtype=tensor.dtype, device=META))
    if isinstance(tensor, nn.Parameter):
        # `nn.Parameter` itself imports distributed tensors, to ask whether this is one.
        hollow._is_param = True
        hollow.requires_grad_(tensor.requires_grad)
    return hollow


def _pass(
    model: nn.Module,
    batch: Batch,
    dtype: Dtype,
    *,
    accumulates: bool = False,
    compiled: Compiled | None = None,
) -> Pass:
    """accumulates: an earlier micro-batch's gradients are there, and each new one is added.
    compiled: takes up the pass's products."""
    product = TORCH_DTYPES[dtype]
    ledger = Ledger([*model.parameters(), *model.buffers()])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with ledger:
        # As in training: fused layers learn from a pass without gradients who shares an input.
        with copy.copy(autocast), torch.no_grad():
            loss_sum(model, batch, product)
        # What stays of that is cached (a mask, where rows are), and there before any pass.
        floor = ledger.live
        if accumulates:
            for weight in trained(model).values():
                weight.grad = torch.zeros_like(weight)
        ledger.flops, ledger.history = 0.0, []
        with autocast:
            loss = loss_sum(model, batch, product)
        forward_flops, forward, kept = ledger.flops, ledger.history, ledger.live
        if compiled is not None:
            compiled.forward |= ledger.products
        ledger.flops, ledger.history = 0.0, []
        loss.backward()  # type: ignore[no-untyped-call]
    if compiled is not None:
        compiled.both |= ledger.products
    half = len(ledger.history) // 2
    early, late = ledger.history[:half], ledger.history[half:]
    for weight in model.parameters():
        weight.grad = None
    return Pass(
        forward_flops,
        ledger.flops,
        float(kept - floor),
        *(float(max(part, default=kept) - floor) for part in (forward, early, late)),
    )


def _values(cost: Pass) -> list[Any]:
    return list(vars(cost).values())
