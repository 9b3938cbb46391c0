"""`python -m tasks.cost`: what each candidate of a recipe would cost, from shapes alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.candidates import FewShot
from schemas.cost import Cost, CostReport
from schemas.errors import Problem, UserError
from schemas.stages import CostSpec
from schemas.tasks import reads_images
from schemas.together import Candidate
from tasks.core.images import image_shape
from tasks.core.models import read_labels
from tasks.core.runtime import TORCH_DTYPES, Dtype
from tasks.core.shots import room_of
from tasks.cost import memory
from tasks.cost.dry import dry_run
from tasks.cost.larger import larger
from tasks.cost.rows import FullRow, mean_of
from tasks.cost.shapes import base_on_meta, candidate_on_meta, config_of
from tasks.cost.side_by_side import side_by_side
from tasks.methods import soft
from tasks.methods.method import count_parameters, head_parameters, trained
from tasks.methods.table import method_for, methods_of

FILE = "plan.json"


def run(spec: CostSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write plan.json: a record for each candidate. paths: base, prepared, each if there is one.

    Raises:
        UserError: the problems of all candidates together, each at its place in the recipe.
    """
    prepared = paths.get("prepared")
    labels = read_labels(prepared) if prepared else None
    config = config_of(paths.get("base"), spec.shape, len(labels) if labels else None)
    if spec.times != 1:
        config = larger(config, spec.task, spec.dtype, spec.times)
    torch.set_num_threads(1)
    base = base_on_meta(config, spec.task, spec.dtype)
    full = full_row(spec, base)
    answers = side_by_side(
        [
            partial(cost_or_problems, index, spec, config, candidate, prepared, base, full)
            for index, candidate in enumerate(spec.candidates)
        ]
    )
    problems = [problem for answer in answers if isinstance(answer, list) for problem in answer]
    if problems:
        raise UserError(problems)
    labels_of = [candidate.label for candidate in spec.candidates]
    found = dict(zip(labels_of, answers, strict=True))
    record = CostReport(total_parameters=count_parameters(base), candidates=found)
    (out_dir / FILE).write_text(record.model_dump_json(indent=1))
    return record.model_dump(mode="json")


def cost_or_problems(
    index: int, spec: CostSpec, config: Any, candidate: Candidate, *of: Any
) -> Cost | list[Problem]:
    """`cost`, or what is wrong with the candidate at that place of the recipe."""
    try:
        return cost(spec, config, candidate, *of)
    except UserError as error:
        return [placed(problem, index) for problem in error.problems]


def cost(
    spec: CostSpec,
    config: Any,
    candidate: Candidate,
    prepared: Path | None,
    base: nn.Module,
    full: FullRow,
) -> Cost:
    """One candidate's figures. base: untouched. full: what stands for rows without `prepared`."""
    method = method_for(candidate.method, spec.task)
    model = candidate_on_meta(config, spec.task, candidate, spec.dtype)
    serving = partial(memory.inference, model, config, spec.task, spec.evaluate, spec.dtype)
    if method.format == "prompt":
        before = examples_tokens(candidate, config, spec, prepared)
        return Cost(
            trainable_parameters=0,
            trainable_share=0.0,
            shipped_mib=None,
            inference_mib=serving(0, before),
        )
    learned = sum(weight.numel() for weight in trained(model).values())
    shipped = shipped_bytes(base, candidate, spec.task, spec.dtype)
    inference_mib = serving(shipped, soft.virtual_tokens(model))
    train = spec.train.for_candidate(candidate.train)
    dry = dry_run(
        model,
        spec.task,
        train,
        spec.dtype,
        prepared,
        full,
        partial(method.course, model, candidate),
    )
    return Cost(
        trainable_parameters=learned,
        trainable_share=learned / count_parameters(base),
        shipped_mib=shipped / memory.MIB,
        training_mib=memory.training(model, dry, spec.dtype, train.gradient_checkpointing),
        inference_mib=inference_mib,
        forward_flops_per_token=dry.cost.forward_flops / dry.tokens,
        backward_flops_per_token=dry.cost.backward_flops / dry.tokens,
        step_flops=dry.step_flops,
        steps=dry.load.steps,
        tokens=dry.load.tokens,
        gradient_checkpointing=train.gradient_checkpointing,
    )


def full_row(spec: CostSpec, base: nn.Module) -> FullRow:
    """What stands for rows that are not prepared. base: untouched."""
    if not reads_images(spec.task):
        return FullRow(spec.max_length)
    shape = image_shape(base)
    return FullRow(shape.tokens, shape.pixels)


def shipped_bytes(base: nn.Module, candidate: Candidate, task: str, dtype: Dtype) -> int:
    """Of the weights that are saved: by each of several methods its own, by the last the head."""
    total, methods = 0, methods_of(candidate)
    for method, part in zip(methods, candidate.parts, strict=True):
        count = (method.ships or method.trainable_parameters)(base, part, task)
        if method is not methods[-1]:
            count -= head_parameters(base, task)
        in_float32 = method.format == "peft-adapter" and not method.replaces
        total += count * (4 if in_float32 else TORCH_DTYPES[dtype].itemsize)
    return total


def examples_tokens(
    candidate: Candidate, config: Any, spec: CostSpec, prepared: Path | None
) -> float:
    """Tokens of the examples in front of a prompt: rows of the mean length, as many as there is
    room for."""
    if not isinstance(candidate, FewShot):
        return 0.0
    wanted = candidate.examples * mean_of(prepared, spec.max_length)
    room = room_of(config, spec.evaluate.max_new_tokens)
    if room is None:
        return wanted
    return min(wanted, max(0.0, room - max(spec.evaluate.prompt_lengths)))


def placed(problem: Problem, index: int) -> Problem:
    """The problem at `candidates[index]`, where a method can only say `candidates[...]`."""
    if not problem.place.startswith("candidates"):
        return problem
    key = problem.place.partition("].")[2]
    return Problem(f"candidates[{index}].{key or 'method'}", problem.found, problem.fix)
