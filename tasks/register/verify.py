"""Whether a registered version gives the logits of the entry that it was made from.

MLflow can report success and reload something else, so nothing counts as registered before it
was loaded back, in a process that knows nothing of this one (`reload.py`).
Both sides run on the CPU, in the same dtype, with as many threads: the difference is zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from schemas.errors import StageError
from schemas.tasks import is_encoder_decoder, is_packable, reads_images
from tasks.core.models import load_config, load_trained
from tasks.core.shots import Shots, room_of
from tasks.register.asked import Asked, held_out_rows
from tasks.register.reload import in_json, read_rows, write_rows

#: Held-out rows that are compared.
ROWS = 8

#: The same weights, dtype, kernels and threads on the same processor give the same bits.
TOLERANCE = 0.0


@dataclass(frozen=True)
class Reloaded:
    """What a version does, loaded back.

    difference: the largest of a logit, to the finished entry's. rows: that were compared.
    asked_alike: of these, the rows whose text it turns into the very tokens that were evaluated.
    """

    difference: float
    rows: int
    asked_alike: int


def reload(
    model_uri: str, tracking: str, paths: dict[str, Path], serving: dict[str, Any], scratch: Path
) -> Reloaded:
    """Load a version in a fresh process and compare it with the entry, over held-out rows.

    Raises:
        StageError: the version cannot be loaded.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    rows = asked_rows(paths, serving)
    request, answer = scratch / "request", scratch / "answer"
    for directory in (request, answer):
        directory.mkdir(exist_ok=True)
    (request / "asked.json").write_text(json.dumps([in_json(row.text) for row in rows]))
    write_rows([row.tokens for row in rows], request)
    # Where a row's source ends, if it is two.
    pairs = is_encoder_decoder(serving["task"])
    ends = [len(row.prompt) if pairs else None for row in rows]
    (request / "ends.json").write_text(json.dumps(ends))
    # -P: a directory named `tasks` where the user stands must not be taken for ours.
    command = [
        sys.executable,
        "-P",
        "-m",
        "tasks.register.reload",
        model_uri,
        str(request),
        str(answer),
    ]
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "MLFLOW_TRACKING_URI": tracking,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    log = scratch / "reload.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, env=environment, stdout=errors, stderr=errors) as child,
    ):
        try:
            expected = expected_logits(rows, paths, serving)
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise StageError(f"{model_uri} cannot be loaded back:\n{log.read_text()[-2000:]}")
    got = load_file(answer / "logits.safetensors")
    asked = read_rows(answer)
    return Reloaded(
        difference=max(difference(one, got[str(index)]) for index, one in enumerate(expected)),
        rows=len(rows),
        asked_alike=sum(
            np.array_equal(row.prompt, tokens) for row, tokens in zip(rows, asked, strict=True)
        ),
    )


def asked_rows(paths: dict[str, Path], serving: dict[str, Any]) -> list[Asked]:
    """The held-out rows, behind the examples with which the finished entry is asked, if any."""
    rows = held_out_rows(paths["prepared"], ROWS)
    shots = Shots.load(paths["finished"] / "model")
    if shots is None:
        return rows
    longest = serving["max_new_tokens"]
    room = room_of(load_config(paths["base"]), longest)
    shown = []
    for row in rows:
        prompt = shots.ask(np.array(row.prompt, dtype=np.int32), room).tokens.tolist()
        answer = row.tokens[len(row.prompt) :][:longest]
        shown.append(Asked(row.text, [*prompt, *answer], prompt))
    return shown


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of an element; infinite where shapes or NaNs differ."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().nan_to_num(nan=float("inf")).max())


@torch.inference_mode()
def expected_logits(
    rows: list[Asked], paths: dict[str, Path], serving: dict[str, Any]
) -> list[torch.Tensor]:
    """What the finished entry gives, one row at a time, float32; shapes as `ServedModel.logits`."""
    model = load_trained(
        paths["base"],
        paths["finished"] / "model",
        serving["task"],
        serving["labels"],
        serving["dtype"],
    )
    logits = [model(**whole(row, serving["task"])).logits[0].float() for row in rows]
    if not is_packable(serving["task"]):
        return logits
    # PEFT gives logits of the virtual tokens of a prompt too, in front.
    return [logits_TV[-len(row.tokens) :] for logits_TV, row in zip(logits, rows, strict=True)]


def whole(row: Asked, task: str) -> dict[str, torch.Tensor]:
    """All of a row as its model takes it: a decoder beside an encoder shifts its labels itself."""
    if not is_encoder_decoder(task):
        name = "pixel_values" if reads_images(task) else "input_ids"
        return {name: torch.as_tensor(row.tokens)[None]}
    end = len(row.prompt)
    source, target = row.tokens[:end], row.tokens[end:]
    return {"input_ids": torch.tensor([source]), "labels": torch.tensor([target])}
