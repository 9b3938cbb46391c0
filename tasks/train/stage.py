"""The train stage: token rows and a base in, a tuned adapter (or model) and its curve out."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.errors import StageError, UserError
from schemas.stages import TrainSpec
from tasks.core import runtime
from tasks.core.files import sha256_json, write_atomic
from tasks.core.models import load_base, read_labels
from tasks.core.progress import say, warn
from tasks.core.store import SCRATCH
from tasks.core.tokens import TokenRows
from tasks.methods.method import count_parameters, trained
from tasks.methods.table import method_for
from tasks.train import placement
from tasks.train.batching import Plan, answer_tokens, collate, micro_batches
from tasks.train.checkpoint import Checkpoints
from tasks.train.loop import Job, make_optimizer, train
from tasks.train.loss import check_head
from tasks.train.memory import available_mib, check_fits, needed_mib
from tasks.train.output import save_model
from tasks.train.watch import WINDOW, digests, mean_loss, unmoved

#: Rows longer than this are cut for the probes of the head and of memory.
PROBE_TOKENS = 64


def run(spec: TrainSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Train one candidate. paths: prepared, base. Writes model/ and curve.json.

    Raises:
        UserError: a target, rank, base or budget that cannot be.
        StageError: training went wrong (`tasks.train.watch`).
    """
    method = method_for(spec.candidate.method, spec.task)
    rows, labels = read_rows(spec, paths["prepared"])
    placement.seed(spec.train.seed)
    runtime.peak_reset()
    floor = 0.0 if runtime.device().type == "cuda" else runtime.resident_mib()

    base_dtype: runtime.Dtype = "float32" if method.trained_base else spec.dtype
    model = load_base(paths["base"], spec.task, labels, base_dtype, head_seed=spec.train.seed)
    total = count_parameters(model)
    expected = method.trainable_parameters(model, spec.candidate, spec.task)
    pad_id = pad_token(model)
    torch.manual_seed(spec.train.seed)
    accelerator = placement.make_accelerator(spec.dtype)
    model = method.build(model, spec.candidate, spec.task)
    model = placement.place(model, spec.train, accelerator, frozen_base=not method.trained_base)
    weights = trained(model)
    trainable = sum(weight.numel() for weight in weights.values())
    if trainable != expected:
        raise StageError(f"{method.name} trains {trainable:,} weights, not {expected:,}")

    job = make_job(spec, rows, labels, accelerator.device, pad_id)
    probe(model, weights, job, accelerator.device)
    optimizer = make_optimizer(weights, spec.train)
    before = digests(weights)
    identity = sha256_json(
        [spec.model_dump(mode="json"), spec.VERSION, len(rows), before_id(before)]
    )
    checkpoints = Checkpoints(out_dir / SCRATCH, identity)
    state = checkpoints.restore(weights, optimizer)
    resumed_from = 0 if state is None else state.step
    say(
        f"{method.name}: {trainable:,} of {total:,} weights learn ({trainable / total:.2%}), "
        f"{len(rows):,} rows, {job.steps} steps of about {spec.train.batch_tokens:,} tokens"
    )
    state = train(model, weights, optimizer, job, accelerator, checkpoints, state)

    check_learned(before, weights, state.curve)
    # Before saving: a whole model is rounded to its own dtype, a copy that training never holds.
    peak = runtime.peak_mib() - floor
    save_model(model, out_dir / "model", paths["base"], spec.dtype, method.format)
    write_atomic(out_dir / "curve.json", json.dumps([p.model_dump() for p in state.curve]))
    return {
        "method": method.name,
        "format": method.format,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_share": trainable / total,
        "steps": state.step,
        "epochs": state.curve[-1].epoch,
        "first_loss": state.curve[0].loss,
        "final_loss": mean_loss(state.curve[-WINDOW:]),
        "tokens": state.tokens,
        "train_seconds": state.seconds,
        "step_time_s": statistics.median(point.step_time_s for point in state.curve),
        "tokens_per_s": state.tokens / state.seconds,
        "train_peak_mib": peak,
        "resumed_from_step": resumed_from,
        "threads": torch.get_num_threads(),
    }


def read_rows(spec: TrainSpec, prepared: Path) -> tuple[TokenRows, list[str] | None]:
    """The train rows and, for classification, the label names.

    Raises:
        UserError: no rows.
    """
    path = prepared / "tokens" / "train.safetensors"
    rows = TokenRows.load(path)
    if len(rows) == 0:
        raise UserError.at(path, "no rows to train on", "see the data report for what was refused")
    return rows, read_labels(prepared) if spec.task == "sequence-classification" else None


def make_job(
    spec: TrainSpec,
    rows: TokenRows,
    labels: list[str] | None,
    device: torch.device,
    pad_id: int,
) -> Job:
    default = placement.MICRO_BATCH_TOKENS[device.type]
    return Job(
        rows=rows,
        answers=answer_tokens(rows, spec.task),
        plan=Plan(rows.lengths, spec.train.batch_tokens, spec.train.seed),
        task=spec.task,
        train=spec.train,
        dtype=runtime.TORCH_DTYPES[spec.dtype],
        micro_batch_tokens=spec.train.micro_batch_tokens or default,
        pad_id=pad_id,
        pack=device.type == "cuda" and spec.task == "causal-lm",
        chance=math.log(len(labels)) if labels else None,
    )


def pad_token(model: torch.nn.Module) -> int:
    """The id that fills a batch. Nothing ever looks at it, so any will do where there is none."""
    padding = model.config.pad_token_id  # type: ignore[union-attr]
    return 0 if padding is None else int(padding)  # type: ignore[arg-type]


def probe(
    model: torch.nn.Module,
    weights: dict[str, torch.nn.Parameter],
    job: Job,
    device: torch.device,
) -> None:
    """What can be known before the first step: the head is the head, and the run fits."""
    lengths = job.rows.lengths
    shortest = int(np.argmin(lengths))
    with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == torch.bfloat16):
        if job.task == "causal-lm":
            ids = torch.from_numpy(job.rows.row(shortest)[:PROBE_TOKENS].astype(np.int64))
            check_head(model, ids[None].to(device), job.dtype)
        few = np.argsort(lengths, kind="stable")[: max(1, PROBE_TOKENS // int(lengths.min()))]
        batch = collate(job.rows, few, job.task, job.pad_id).to(device)
        every = np.arange(len(lengths))
        largest = micro_batches(every, lengths, job.micro_batch_tokens)[0]
        padded = max(int(lengths.max()) * len(largest), job.micro_batch_tokens)
        needed = needed_mib(model, weights, batch, padded, job.dtype)
    check_fits(needed, available_mib(device), job.train.gradient_checkpointing)


def check_learned(
    before: dict[str, bytes], weights: dict[str, torch.nn.Parameter], curve: list[Any]
) -> None:
    """Raise for a method that changed nothing; say aloud what did not move or fall."""
    still = unmoved(before, weights)
    if len(still) == len(weights):
        raise StageError(
            "no trained weight moved: the method is not applied to what the loss depends on; "
            "check target_modules, and that train.learning_rate is not too small"
        )
    if still:
        warn(f"{len(still)} of {len(weights)} trained tensors did not move, e.g. {still[0]}")
    first, last = mean_loss(curve[: WINDOW // 2]), mean_loss(curve[-WINDOW:])
    if len(curve) > WINDOW and last >= first:
        warn(
            f"the loss did not fall: {first:.4f} over the first steps, {last:.4f} over the last; "
            "train longer, or change train.learning_rate"
        )


def before_id(before: dict[str, bytes]) -> str:
    return sha256_json({name: digest.hex() for name, digest in before.items()})
