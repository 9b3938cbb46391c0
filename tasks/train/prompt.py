"""What training leaves of a candidate without weights: the examples that its prompts are shown.

No model is loaded and no step is made: the entry has an empty curve, and None for every figure
of a training that was not.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.candidates import FewShot
from schemas.errors import UserError
from schemas.stages import TrainSpec
from tasks.core.files import write_atomic
from tasks.core.models import MODEL_CLASSES, load_config, load_tokenizer
from tasks.core.progress import say
from tasks.core.shots import Shots
from tasks.core.tokens import TokenRows
from tasks.methods.method import count_parameters


def make_prompt(
    spec: TrainSpec, rows: TokenRows, paths: dict[str, Path], out_dir: Path
) -> dict[str, Any]:
    """Write model/ and an empty curve.json; the facts of a train entry.

    Raises:
        UserError: fewer rows than examples.
    """
    shots = shots_of(spec, rows, load_tokenizer(paths["base"]).bos_token_id)
    model_dir = out_dir / "model"
    model_dir.mkdir(exist_ok=True)
    shots.save(model_dir)
    write_atomic(out_dir / "curve.json", "[]")
    total = base_parameters(paths["base"], spec.task)
    name = spec.candidate.method
    say(
        f"{name}: nothing is trained; at most {shots.count} examples before a prompt, "
        f"of {len(shots.rows):,} rows"
        if shots.count
        else f"{name}: nothing is trained, and nothing stands before a prompt"
    )
    never = ("first_loss", "final_loss", "step_time_s", "tokens_per_s", "train_peak_mib")
    return {
        "method": name,
        "format": spec.candidate.FORMAT,
        "trainable_parameters": 0,
        "total_parameters": total,
        "trainable_share": 0.0,
        "steps": 0,
        "epochs": 0.0,
        "tokens": 0,
        "train_seconds": 0.0,
        **dict.fromkeys(never),
    }


def shots_of(spec: TrainSpec, rows: TokenRows, bos: int | None) -> Shots:
    """The examples of a candidate: none, those that its seed draws, or all rows to choose from.

    Raises:
        UserError: fewer rows than examples.
    """
    candidate = spec.candidate
    if not isinstance(candidate, FewShot):
        return Shots(take(rows, np.arange(0)), 0, "seed", None)
    if candidate.examples > len(rows):
        raise UserError.at(
            "candidates[method=few_shot].examples",
            f"{candidate.examples}, and there are {len(rows)} train rows",
            f"give at most {len(rows)}",
        )
    pool = np.arange(len(rows))
    if candidate.choose == "seed":
        pool = drawn(rows, candidate.examples, spec.train.seed)
    return Shots(take(rows, pool), candidate.examples, candidate.choose, leading(rows, bos))


def drawn(rows: TokenRows, count: int, seed: int) -> NDArray[np.int64]:
    """`count` rows by the hash of the seed and their tokens: whatever the order of the rows."""

    def digest(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:".encode() + rows.row(index).tobytes()).digest()

    return np.array(sorted(range(len(rows)), key=digest)[:count], dtype=np.int64)


def leading(rows: TokenRows, bos: int | None) -> int | None:
    """The BOS, if it begins every row and no turn.

    A template may begin each of its turns with the token that the tokenizer calls BOS (ChatML's
    `<|im_start|>`), twice or more a row: that one belongs to the turn, and is kept.
    """
    if bos is None:
        return None
    begins = int(np.count_nonzero(rows.input_ids[rows.offsets[:-1]] == bos))
    everywhere = int(np.count_nonzero(rows.input_ids == bos))
    return bos if begins == len(rows) and everywhere < 2 * begins else None


def take(rows: TokenRows, chosen: NDArray[np.int64]) -> TokenRows:
    """The rows of these indices, in their order, with what choosing them needs."""
    assert rows.answer_start is not None, "rows of a causal task"
    parts = [rows.row(index) for index in chosen]
    return TokenRows(
        input_ids=np.concatenate([np.empty(0, np.int32), *parts]),
        offsets=np.cumsum([0, *map(len, parts)], dtype=np.int64),
        source_rows=rows.source_rows[chosen],
        answer_start=rows.answer_start[chosen],
    )


def base_parameters(base: Path, task: str) -> int:
    """The base's parameters, from its shapes alone."""
    with torch.device("meta"):
        return count_parameters(MODEL_CLASSES[task].from_config(load_config(base)))
