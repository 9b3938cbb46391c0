"""The train stage: token rows and a base in, a tuned adapter (or model) and its curve out."""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

from schemas.errors import DivergedError, StageError, UserError
from schemas.report import CurvePoint
from schemas.stages import TrainSpec, keyed
from schemas.tasks import is_encoder_decoder, is_labelled, is_packable, reads_images
from tasks.core import runtime
from tasks.core.checkpoint import Checkpoints
from tasks.core.files import sha256_file, sha256_json, write_atomic
from tasks.core.models import decoder_start, load_base, read_labels
from tasks.core.plan import Plan
from tasks.core.progress import say, warn
from tasks.core.store import SCRATCH
from tasks.core.tokens import TokenRows, pixels_file
from tasks.methods import soft
from tasks.methods.method import count_parameters, trained
from tasks.methods.table import method_for, methods_of
from tasks.train import heap, placement
from tasks.train.batching import answer_tokens
from tasks.train.computed import flops_per_token
from tasks.train.held import parts_mib
from tasks.train.loop import Job, make_optimizer, train
from tasks.train.loss import backbone, unwrapped
from tasks.train.memory import available_mib, check_fits, needed_mib
from tasks.train.output import save_model
from tasks.train.pairs import longest_sides
from tasks.train.probe import check_loss, check_packed_apart, own_loss, probe_rows
from tasks.train.prompt import make_prompt
from tasks.train.unpad import unpad
from tasks.train.watch import WINDOW, digests, mean_loss, unmoved

TOKENS = "tokens/train.safetensors"
#: In the names of weights that PEFT trains whole beside an adapter: heads.
SAVED = ".modules_to_save."


def run(spec: TrainSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Train one candidate. paths: prepared, base. Writes model/ and curve.json.

    Of what has no weights to train (`tasks/train/prompt.py`), the examples and an empty curve.

    Raises:
        UserError: a target, rank, base or budget that cannot be.
        StageError: training went wrong (`tasks.train.watch`).
    """
    method = method_for(spec.candidate.method, spec.task)
    rows, labels = read_rows(spec, paths["prepared"])
    if method.format == "prompt":
        return make_prompt(spec, rows, paths, out_dir)
    checkpoints = Checkpoints(out_dir / SCRATCH, identity(spec, paths["prepared"]))
    placement.seed(spec.train.seed)
    torch.set_num_threads(checkpoints.threads)
    runtime.peak_reset()
    floor = 0.0 if runtime.device().type == "cuda" else runtime.resident_mib()
    heap.arrange()

    base_dtype: runtime.Dtype = "float32" if method.trained_base else spec.dtype
    model: Any = load_base(
        paths["base"],
        spec.task,
        labels,
        base_dtype,
        head_seed=spec.train.seed,
        quantisation=method.quantises(spec.candidate),
    )
    total, pad_id = count_parameters(model), pad_token(model)
    expected = method.trainable_parameters(model, spec.candidate, spec.task)
    torch.manual_seed(spec.train.seed)
    model = method.build(model, spec.candidate, spec.task)
    weights = trained(model)
    trainable = sum(weight.numel() for weight in weights.values())
    if trainable != expected:
        raise StageError(f"{method.name} trains {trainable:,} weights, not {expected:,}")

    job = prepare_job(spec, rows, labels, model, pad_id)
    optimizer = make_optimizer(
        weights,
        spec.train,
        partial(method.rate_of, spec.candidate),
        method.decays,
        paged=runtime.device().type == "cuda" and method.quantises(spec.candidate) is not None,
    )
    course = method.course(model, spec.candidate, job.steps)
    before = digests(weights)
    state = checkpoints.restore(weights, optimizer, course)
    resumed_from = 0 if state is None else state.step
    say(
        f"{method.name}: {trainable:,} of {total:,} weights learn ({trainable / total:.2%}), "
        f"{len(rows):,} rows, {job.steps} steps of about {spec.train.batch_tokens:,} tokens"
    )
    state = train(model, weights, optimizer, job, checkpoints, state, course)
    check_learned(before, weights, state.curve)
    own_facts = course.finish()

    # Before saving: a whole model is rounded to its own dtype, a copy that training never holds.
    peak = runtime.peak_mib() - floor
    held = parts_mib(model, weights, optimizer, job, peak)
    flops = flops_per_token(model, job)
    methods = methods_of(spec.candidate)
    save_model(model, out_dir / "model", paths["base"], spec.dtype, *methods)
    course.export(out_dir / "model")
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
        **held,
        "train_flops_per_token": flops,
        "resumed_from_step": resumed_from,
        "threads": checkpoints.threads,
        **own_facts,
    }


def read_rows(spec: TrainSpec, prepared: Path) -> tuple[TokenRows, list[str] | None]:
    """The train rows and, for classification, the label names.

    Raises:
        UserError: no rows.
    """
    rows = TokenRows.load(prepared / TOKENS)
    if len(rows) == 0:
        place = prepared / TOKENS
        raise UserError.at(place, "no rows to train on", "see the data report for what was refused")
    return rows, read_labels(prepared) if is_labelled(spec.task) else None


def identity(spec: TrainSpec, prepared: Path) -> str:
    """What a checkpoint must agree with. The store's key, of which it is part, adds the base."""
    own = keyed(spec.model_dump(mode="json"), spec.UNKEYED)
    files = [prepared / TOKENS, pixels_file(prepared / TOKENS)]
    record = [own, spec.VERSION, *(sha256_file(file) for file in files if file.exists())]
    return sha256_json(record)


def pad_token(model: Any) -> int:
    """The id that fills a batch. Nothing ever looks at it, so any will do where there is none."""
    padding = getattr(model.config, "pad_token_id", None)
    return 0 if padding is None else int(padding)


def start_token(model: Any, task: str) -> int:
    """What a decoder beside an encoder begins with; 0, and unused, where there is none."""
    return decoder_start(unwrapped(model).config) if is_encoder_decoder(task) else 0


def prepare_job(
    spec: TrainSpec,
    rows: TokenRows,
    labels: list[str] | None,
    model: torch.nn.Module,
    pad_id: int,
) -> Job:
    """Put the model where it runs, with its fast paths, and prove on two rows that they are right.

    Raises:
        UserError: the run does not fit in memory, or the base is of a kind not known.
    """
    accelerator = placement.make_accelerator(spec.dtype)
    device, dtype = accelerator.device, runtime.TORCH_DTYPES[spec.dtype]
    few = probe_rows(rows)
    with accelerator.autocast():
        expected = own_loss(model.to(device), few, spec.task, device)
    placement.place(model, spec.train, device)
    longest = int(rows.lengths.max())
    soft.check_room(model, *longest_sides(rows, spec.task))
    fast = placement.use_fast_attention(model, device, longest, spec.task)
    packed = fast and is_packable(spec.task)
    if spec.train.gradient_checkpointing and not packed:
        soft.check_checkpointing(model)
    # Layers with keys and values of more than their own tokens cannot take the padding out.
    whole = packed or soft.is_cache(model)
    padded = not whole and not reads_images(spec.task)
    unpadded = fast and padded and device.type == "cpu" and unpad(backbone(model))
    job = Job(
        rows=rows,
        answers=answer_tokens(rows, spec.task),
        plan=Plan(rows.lengths, spec.train.batch_tokens, spec.train.seed),
        task=spec.task,
        train=spec.train,
        accelerator=accelerator,
        dtype=dtype,
        layout=placement.layout(
            spec.train,
            device,
            packed,
            pad_id,
            unpadded,
            virtual=0 if soft.is_cache(model) else soft.virtual_tokens(model),
            start_id=start_token(model, spec.task),
        ),
        chance=math.log(len(labels)) if labels else None,
    )
    model.eval()
    with accelerator.autocast():
        check_loss(model, few, spec.task, job.layout, expected, device, dtype)
        if packed:
            check_packed_apart(model, few, device)
        model.train()
        needed = needed_mib(model, trained(model), job, device)
    check_fits(needed, available_mib(device), spec.train.gradient_checkpointing)
    return job


def check_learned(
    before: dict[str, bytes], weights: dict[str, torch.nn.Parameter], curve: list[CurvePoint]
) -> None:
    """Raise for a method that changed nothing; say aloud what did not move or fall.

    A head that is trained beside an adapter moves whatever becomes of the adapter.

    Raises:
        DivergedError: nothing of the method's own moved.
    """
    still = unmoved(before, weights)
    own = [name for name in weights if SAVED not in name] or list(weights)
    if set(own) <= set(still):
        raise DivergedError(
            "no trained weight moved: the method is not applied to what the loss depends on; "
            "check target_modules, and that train.learning_rate is not too small"
        )
    if still:
        warn(f"{len(still)} of {len(weights)} trained tensors did not move, e.g. {still[0]}")
    half = len(curve) // 2
    first, last = mean_loss(curve[: min(half, WINDOW // 2)]), mean_loss(curve[-min(half, WINDOW) :])
    if half > 1 and last >= first:
        warn(
            f"the loss did not fall: {first:.4f} over the first steps, {last:.4f} over the last; "
            "train longer, or change train.learning_rate"
        )
