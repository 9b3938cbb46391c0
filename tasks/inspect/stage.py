"""Builds every candidate on the meta device: shapes without weights, in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.errors import Problem, UserError
from schemas.stages import InspectSpec
from schemas.together import Candidate
from tasks.core.models import load_config, model_on_meta
from tasks.methods.method import count_parameters, trained
from tasks.methods.table import method_for


def run(spec: InspectSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write inspection.json: for each candidate its trainable parameters and their share.

    A classifier is counted with the two classes of the configuration's default, since no row
    has been read yet; the train entry has the exact figure.

    Raises:
        UserError: the problems of all candidates together, each at its place in the recipe.
    """
    problems: list[Problem] = []
    found: dict[str, dict[str, float]] = {}
    total = count_parameters(shapes(paths["base"], spec.task))
    for index, candidate in enumerate(spec.candidates):
        try:
            count = trainable(paths["base"], spec.task, candidate)
        except UserError as error:
            problems += [placed(problem, index) for problem in error.problems]
            continue
        found[candidate.label] = {"trainable_parameters": count, "trainable_share": count / total}
    if problems:
        raise UserError(problems)
    (out_dir / "inspection.json").write_text(json.dumps(found, indent=1))
    return {"total_parameters": total, "candidates": found}


def shapes(base: Path, task: str) -> nn.Module:
    """The base without its weights."""
    model: nn.Module = model_on_meta(load_config(base), task, base)
    return model


def trainable(base: Path, task: str, candidate: Candidate) -> int:
    """How many parameters a candidate trains, counted on the model that its method builds."""
    model = shapes(base, task)
    with torch.device("meta"):
        tuned = method_for(candidate.method, task).build(model, candidate, task)
    return sum(weight.numel() for weight in trained(tuned).values())


def placed(problem: Problem, index: int) -> Problem:
    """The problem at `candidates[index]`, where a method can only say `candidates[...]`."""
    key = problem.place.partition("].")[2]
    return Problem(f"candidates[{index}].{key or 'method'}", problem.found, problem.fix)
