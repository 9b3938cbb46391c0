"""`python -m tasks.cost`: what each candidate of a recipe would cost, from shapes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from schemas.candidates import Candidate
from schemas.errors import Problem, UserError
from schemas.stages import CostSpec
from tasks.core.models import read_labels
from tasks.core.runtime import TORCH_DTYPES
from tasks.cost import memory
from tasks.cost.dry import dry_run
from tasks.cost.shapes import base_on_meta, candidate_on_meta, config_of
from tasks.methods.method import count_parameters, trained
from tasks.methods.table import method_for

FILE = "plan.json"


def run(spec: CostSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write plan.json: a record for each candidate. paths: base, prepared, each if there is one.

    Raises:
        UserError: the problems of all candidates together, each at its place in the recipe.
    """
    prepared = paths.get("prepared")
    labels = read_labels(prepared) if prepared else None
    config = config_of(paths.get("base"), spec.shape, len(labels) if labels else None)
    torch.set_num_threads(1)
    total = count_parameters(base_on_meta(config, spec.task, spec.dtype))
    problems: list[Problem] = []
    found: dict[str, Any] = {}
    for index, candidate in enumerate(spec.candidates):
        try:
            found[candidate.label] = cost(spec, config, candidate, prepared, total)
        except UserError as error:
            problems += [placed(problem, index) for problem in error.problems]
    if problems:
        raise UserError(problems)
    record = {"total_parameters": total, "candidates": found}
    (out_dir / FILE).write_text(json.dumps(record, indent=1))
    return record


def cost(
    spec: CostSpec, config: Any, candidate: Candidate, prepared: Path | None, total: int
) -> dict[str, Any]:
    """One candidate's figures. Bytes in MiB; FLOPs a real token."""
    method = method_for(candidate.method, spec.task)
    train = spec.train.for_candidate(candidate.train)
    model = candidate_on_meta(config, spec.task, candidate, spec.dtype)
    learned = sum(weight.numel() for weight in trained(model).values())
    serving = memory.inference(model, config, spec.task, spec.evaluate, spec.dtype)
    dry = dry_run(model, spec.task, train, spec.dtype, prepared, spec.max_length)
    item = 4 if method.format == "peft-adapter" else TORCH_DTYPES[spec.dtype].itemsize
    return {
        "trainable_parameters": learned,
        "trainable_share": learned / total,
        "shipped_mib": learned * item / memory.MIB,
        "training_mib": memory.training(model, dry.cost, spec.dtype, train.gradient_checkpointing),
        "inference_mib": serving,
        "forward_flops_per_token": dry.cost.forward_flops / dry.tokens,
        "backward_flops_per_token": dry.cost.backward_flops / dry.tokens,
        "steps": dry.load.steps,
        "tokens": dry.load.tokens,
        "gradient_checkpointing": train.gradient_checkpointing,
    }


def placed(problem: Problem, index: int) -> Problem:
    """The problem at `candidates[index]`, where a method can only say `candidates[...]`."""
    if not problem.place.startswith("candidates"):
        return problem
    key = problem.place.partition("].")[2]
    return Problem(f"candidates[{index}].{key or 'method'}", problem.found, problem.fix)
