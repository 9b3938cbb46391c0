"""Criterion 3, computation: FLOPs a token, and a training step beside full fine-tuning's.

The step here is a plain one, forward, backward and AdamW with the adapter's fused layers, on one
micro-batch of train rows of about the median length and without padding, and the same for both
methods. It leaves out what the train stage does around it, as stages do not share code, and
serves for ratios only: the step time and the tokens a second are those of the train stage's own
curve.

Shapes: B rows, T positions, C classes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch.nn.attention import SDPBackend, sdpa_kernel

from schemas.candidates import Full
from schemas.recipe import Train
from schemas.report import Computation, CurvePoint
from schemas.tasks import is_encoder_decoder, is_packable
from schemas.together import Candidate
from tasks.core import runtime
from tasks.core.flops import FlopCounter
from tasks.core.progress import bar, warn
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import Inputs, left_padded, right_padded, run_on
from tasks.evaluate.latency import quiet, wait
from tasks.evaluate.pairs import pair_inputs, sides
from tasks.evaluate.scoring import masked_losses
from tasks.evaluate.subject import Subject
from tasks.methods.fused import fuse_lora
from tasks.methods.method import count_parameters
from tasks.methods.table import method_for

#: Tokens of the micro-batch on a CPU, where a larger one takes longer and tells no more.
CPU_STEP_TOKENS = 1024
ROUNDS = 5
#: Weights, gradients and both moments of AdamW in float32, and as much again for activations.
FULL_BYTES_PER_PARAMETER = 32

CURVE: TypeAdapter[list[CurvePoint]] = TypeAdapter(list[CurvePoint])
CANDIDATE: TypeAdapter[Candidate] = TypeAdapter(Candidate)

HOW = (
    "FLOPs: torch's formulas (2 a multiply-add), attention counted as plain products, over one "
    "unpadded micro-batch of train rows, head at the columns that hold answers; backward with "
    "the gradients that the method needs and no others. Step time and tokens/s: medians of the "
    "train stage's own steps. Ratios to full: a plain forward, backward and AdamW of both in "
    f"one process, taking turns, medians of {ROUNDS}, at most {CPU_STEP_TOKENS} tokens a "
    "micro-batch on a CPU, scaled to the recipe's batch_tokens"
)


@dataclass(frozen=True)
class MicroBatch:
    """Unpadded rows, and what is to be learned of them: columns [B, T], or labels of the N rows
    or of the N tokens; of pairs the N tokens of the targets. tokens: of all rows, on both sides."""

    inputs: Inputs
    tokens: int
    learned_BT: torch.Tensor | None = None
    labels_N: torch.Tensor | None = None


@dataclass(frozen=True)
class StepCost:
    """One method's training: FLOPs a token, and median seconds."""

    forward_flops: float
    backward_flops: float
    micro_batch_s: float
    optimiser_s: float

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops

    def step_s(self, micro_batches: float) -> float:
        """An optimiser step follows as many micro-batches as make the recipe's batch."""
        return micro_batches * self.micro_batch_s + self.optimiser_s


def measure(subject: Subject, model: torch.nn.Module, rows: TokenRows, train: Train) -> Computation:
    """The subject's forward pass, and the training behind it beside full fine-tuning.

    Args:
        model: the subject, loaded, on its device.
        rows: of the train split.
    """
    tokens = min(train.batch_tokens, train.micro_batch_tokens or train.batch_tokens)
    if runtime.device().type == "cpu":
        tokens = min(tokens, CPU_STEP_TOKENS)
    batch = micro_batch(rows, subject.task, tokens)
    parameters = count_parameters(model)
    own, full = step_costs(subject, batch, parameters)
    step_time_s, tokens_per_s = curve_medians(subject.trained_dir)
    micro_batches = train.batch_tokens / batch.tokens
    return Computation(
        forward_flops_per_token=forward_flops(model, batch),
        backward_flops_per_token=None if own is None else own.backward_flops,
        train_flops_per_token=subject.training_facts.get("train_flops_per_token"),
        step_time_s=step_time_s,
        train_tokens_per_s=tokens_per_s,
        flops_ratio_to_full=own.flops / full.flops if own and full else None,
        step_time_ratio_to_full=(
            own.step_s(micro_batches) / full.step_s(micro_batches) if own and full else None
        ),
    )


def micro_batch(rows: TokenRows, task: str, tokens: int) -> MicroBatch:
    """About `tokens` tokens of the rows nearest the median length, cut to the shortest of them.

    A causal row loses the start of its prompt, a classified text its end; of pairs both sides lose
    theirs.
    """
    lengths = rows.lengths
    median = max(2, int(np.median(lengths)))
    nearest = np.argsort(np.abs(lengths - median), kind="stable")[: max(1, tokens // median)]
    width = int(lengths[nearest].min())
    if is_encoder_decoder(task):
        return pair_batch(rows, nearest)
    count = width * len(nearest)
    if is_packable(task):
        cut = [rows.row(index)[-width:] for index in nearest]
        learned_BT = np.stack([rows.mask(index)[-width:] for index in nearest]).astype(bool)
        learned_BT[:, 0] = False  # nothing stands before it
        return MicroBatch(
            left_padded(cut, pad_id=0), count, learned_BT=torch.from_numpy(learned_BT)
        )
    if rows.pixels is not None:
        inputs = {"pixel_values": torch.from_numpy(rows.images(nearest))}
    else:
        inputs = right_padded([rows.row(index)[:width] for index in nearest], pad_id=0)
    if rows.token_labels is not None:
        cut = [rows.token_labels[rows.place(index)][:width] for index in nearest]
        return MicroBatch(inputs, count, labels_N=torch.from_numpy(np.concatenate(cut)).long())
    assert rows.labels is not None
    return MicroBatch(inputs, count, labels_N=torch.from_numpy(rows.labels[nearest]))


def pair_batch(rows: TokenRows, nearest: NDArray[np.int64]) -> MicroBatch:
    """Sources and targets, each cut to the shortest of theirs."""
    both = zip(*(sides(rows, index) for index in nearest), strict=True)
    sources, targets = ([row[: min(map(len, side))] for row in side] for side in both)
    # Any token can stand for the start: what is timed does not depend on it.
    inputs = pair_inputs(sources, targets, pad_id=0, start_id=0)
    count = sum(map(len, sources)) + sum(map(len, targets))
    labels_N = torch.from_numpy(np.concatenate(targets)).long()
    return MicroBatch(inputs, count, labels_N=labels_N)


def loss_of(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """The mean loss of a micro-batch, differentiable."""
    if batch.learned_BT is not None:
        return masked_losses(model, batch.inputs, batch.learned_BT).sum() / batch.learned_BT.sum()
    assert batch.labels_N is not None
    logits_NC = run_on(model, batch.inputs).logits.float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits_NC, batch.labels_N.to(logits_NC.device))


def forward_flops(model: torch.nn.Module, batch: MicroBatch) -> float:
    """FLOPs of a forward pass, a token."""
    # The counter does not know the CPU's fused attention, so attention is spelt out.
    counter = FlopCounter()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        loss_of(model, batch)
    return counter.flops / batch.tokens


def backward_flops(model: torch.nn.Module, batch: MicroBatch) -> float:
    """FLOPs of a backward pass to the weights that require a gradient, a token.

    Frozen weights have no gradient of their own, and nothing is done below the lowest trained
    layer: this is what a method saves.
    """
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_of(model, batch)
        with (counter := FlopCounter()):
            loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return counter.flops / batch.tokens


def step_costs(
    subject: Subject, batch: MicroBatch, parameters: int
) -> tuple[StepCost | None, StepCost | None]:
    """What training costs by the subject's method and by full fine-tuning of the same base."""
    if subject.trained is None or subject.is_prompt:
        return None, None
    candidates: dict[str, Candidate] = {
        "full": Full(method="full"),
        subject.method: CANDIDATE.validate_python(subject.trained.spec["candidate"]),
    }
    if not full_fits(parameters):
        del candidates["full"]
    trainees = {name: Trainee(subject, candidate) for name, candidate in candidates.items()}
    costs = costs_in_turns(trainees, batch)
    return costs.get(subject.method), costs.get("full")


class Trainee:
    """A method's model as it starts to train, with its optimiser. Nothing is learned: rate 0."""

    def __init__(self, subject: Subject, candidate: Candidate) -> None:
        method = method_for(candidate.method, subject.task)
        base = subject.load_base(
            "float32" if method.trained_base else subject.dtype, method.quantises(candidate)
        )
        self.model = method.build(base, candidate, subject.task).to(runtime.device())
        fuse_lora(self.model)
        self.dtype = runtime.TORCH_DTYPES[subject.dtype]
        learned = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.AdamW(learned, lr=0.0, weight_decay=0.0, fused=True)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Products in the recipe's dtype, weights as the method keeps them."""
        device = runtime.device().type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            yield

    def step(self, batch: MicroBatch) -> tuple[float, float]:
        """Seconds of a forward and backward pass, and of the optimiser."""
        device = runtime.device()
        wait(device)
        start = time.perf_counter()
        with self.precision():
            loss = loss_of(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        wait(device)
        middle = time.perf_counter()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        wait(device)
        return middle - start, time.perf_counter() - middle


def costs_in_turns(trainees: dict[str, Trainee], batch: MicroBatch) -> dict[str, StepCost]:
    """Every method's costs; the timed steps take turns, so that noise meets all alike."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainees}
    for trainee in trainees.values():
        # As training begins: fused layers learn from a pass without gradients who shares an input.
        with torch.no_grad(), trainee.precision():
            loss_of(trainee.model, batch)
    with bar("training steps", ROUNDS + 1, "rounds") as progress, quiet():
        for turn in range(ROUNDS + 1):
            for name, trainee in trainees.items():
                seconds = trainee.step(batch)
                if turn > 0:  # the first warms up, and allocates AdamW's moments
                    times[name].append(seconds)
            progress.advance()
    costs: dict[str, StepCost] = {}
    for name, trainee in trainees.items():
        with trainee.precision():
            forward = forward_flops(trainee.model, batch)
            backward = backward_flops(trainee.model, batch)
        costs[name] = StepCost(
            forward_flops=forward,
            backward_flops=backward,
            micro_batch_s=statistics.median(passes for passes, _ in times[name]),
            optimiser_s=statistics.median(update for _, update in times[name]),
        )
    return costs


def full_fits(parameters: int) -> bool:
    """Whether a step of full fine-tuning has room here; said aloud where it has not."""
    need = FULL_BYTES_PER_PARAMETER * parameters
    free = free_bytes()
    if need <= free:
        return True
    warn(
        f"full fine-tuning of this base needs about {need >> 20} MiB and {free >> 20} MiB are "
        "free: its step is not measured, and the ratios to it are left out"
    )
    return False


def free_bytes() -> int:
    """Memory that an allocation may still take, of the device."""
    if runtime.device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


def curve_medians(trained_dir: Path | None) -> tuple[float | None, float | None]:
    """Median seconds of the optimiser steps and median tokens a second, as the run had them.

    None where no step was made.
    """
    if trained_dir is None:
        return None, None
    curve = CURVE.validate_json((trained_dir / "curve.json").read_bytes())
    if not curve:
        return None, None
    # The first step compiles kernels and allocates, in every library; it is no step of the rest.
    points = curve[1:] or curve
    before = [point.tokens for point in curve[:-1]] if len(curve) > 1 else [0]
    rates = [
        (point.tokens - earlier) / point.step_time_s
        for point, earlier in zip(points, before, strict=True)
    ]
    return statistics.median(point.step_time_s for point in points), statistics.median(rates)
