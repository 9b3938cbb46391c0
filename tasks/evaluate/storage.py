"""Criterion 1, storage: what must be shipped for this task beside the base."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from schemas.report import Storage
from tasks.core import quantised
from tasks.core.adapters import CONFIG, TUNER, WEIGHTS, directories
from tasks.core.bases import base_files
from tasks.core.shots import EXAMPLES, PROMPT
from tasks.evaluate.subject import Subject
from tasks.speculate.heads import CONFIG as HEADS_CONFIG
from tasks.speculate.heads import WEIGHTS as HEADS_WEIGHTS

#: What is read of each adapter's directory: by PEFT, which may lack a kind's tuner, and by us where
#: the base is quantised.
ADAPTER_FILES = (CONFIG, WEIGHTS, TUNER, quantised.FILE)
TASKS = 10

HOW = (
    "bytes of the files that loading needs beside the base: an adapter's weights and "
    "configuration, and its tuner's file if PEFT has no such tuner; every file of a whole model; "
    "with those of Turbo heads, where it has some; "
    f"0 for the base itself. {TASKS} tasks: the base's weights, configuration and tokenizer once "
    f"and {TASKS} such adapters, or {TASKS} whole models. Parameters: elements of the trained "
    "tensors, and their share of the base's"
)


def measure(subject: Subject, base: torch.nn.Module, heads: Path | None = None) -> Storage:
    """Bytes to ship, trained parameters, and their share of the base's parameters.

    heads: the directory of Turbo heads that ship with it.
    """
    trained = trainable_parameters(subject)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    shipped = size(shipped_files(subject))
    if heads is not None:
        shipped += size([heads / name for name in (HEADS_CONFIG, HEADS_WEIGHTS)])
    is_whole = subject.whole_dir != subject.base
    return Storage(
        shipped_bytes=shipped,
        ten_tasks_bytes=TASKS * shipped + (0 if is_whole else size(base_files(subject.base))),
        trainable_parameters=trained,
        trainable_share=trained / parameters,
    )


def size(files: list[Path]) -> int:
    """Bytes of some files together."""
    return sum(path.stat().st_size for path in files)


def shipped_files(subject: Subject) -> list[Path]:
    """The files that make the base into the subject."""
    if subject.model_dir is None:
        return []
    if subject.is_adapter:
        places = directories(subject.model_dir)
        files = (place / name for place in places for name in ADAPTER_FILES)
        return [path for path in files if path.exists()]
    if subject.is_prompt:
        shown = (subject.model_dir / EXAMPLES).exists()
        return [subject.model_dir / name for name in (PROMPT, EXAMPLES) if shown]
    return sorted(path for path in subject.model_dir.rglob("*") if path.is_file())


def trainable_parameters(subject: Subject) -> int:
    """As the train stage counted them, else the elements of what it saved."""
    facts: dict[str, Any] = subject.training_facts
    if "trainable_parameters" in facts:
        return int(facts["trainable_parameters"])
    if subject.trained_dir is None:
        return 0
    return sum(
        saved_elements(path) for path in (subject.trained_dir / "model").rglob("*.safetensors")
    )


def saved_elements(path: Path) -> int:
    """The elements of all tensors of a safetensors file, from its header."""
    with safe_open(path, framework="np") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
