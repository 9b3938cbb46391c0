"""What one subject decodes with: the model, its heads, Medusa-1's, and test prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speculation.contenders import Desk
from speculation.subjects import Subject
from transformers import AutoModelForCausalLM

from schemas.turbo import Turbo
from tasks.core.models import load_tokenizer
from tasks.core.stops import stop_ids
from tasks.core.tokens import TokenRows
from tasks.speculate.parts import Parts, parts_of
from tasks.turbo import continuations
from tasks.turbo.stage import HELD_OUT
from tasks.turbo.states import States


def loaded(path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
    return model.eval().requires_grad_(False)


def desk_of(subject: Subject, model: Any) -> Desk:
    rows = TokenRows.load(subject.rows.path / "tokens" / "train.safetensors")
    stops = stop_ids(model, load_tokenizer(subject.base), rows)
    return Desk(model, parts_of(model), stops, subject.task.answer)


def prompts_of(subject: Subject) -> list[list[int]]:
    rows = TokenRows.load(subject.rows.path / "tokens" / "test.safetensors")
    assert rows.answer_start is not None
    return [rows.row(i)[:start].tolist() for i, start in enumerate(rows.answer_start.tolist())]


@dataclass(frozen=True)
class Learned:
    """States that heads learn from, and which of their texts; held: those that they do not."""

    states: States
    chosen: np.ndarray
    held: np.ndarray


def learned(subject: Subject, desk: Desk, turbo: Turbo, work: Path) -> Learned:
    """The states that the turbo stage makes and throws away, made again and kept: the same seed
    gives the same texts."""
    rows = TokenRows.load(subject.rows.path / "tokens" / "train.safetensors")
    prompts = continuations.choose_prompts(rows, turbo, _room(desk.parts, desk.longest))
    directory = work / "states" / f"{subject.merged.key[:12]}-{turbo.prompts}"
    shards = continuations.write(prompts, desk.parts, desk.stops, desk.longest, turbo, directory)
    return split(States(directory, shards))


def split(states: States) -> Learned:
    written = np.flatnonzero(states.lengths > 0)
    held = max(1, round(len(written) * HELD_OUT))
    return Learned(states, written[:-held], written[-held:])


def _room(parts: Parts, longest: int) -> int:
    return (parts.longest or 2**20) - longest
