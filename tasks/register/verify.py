"""Whether a registered version gives the logits of the entry that it was made from.

MLflow can report success and reload something else, so nothing counts as registered before it
was loaded back, in a process that knows nothing of this one: `python -m tasks.register.verify`.
Both sides run on the CPU, in the same dtype, with as many threads: the difference is zero.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from schemas.errors import StageError
from tasks.core.models import load_trained
from tasks.core.tokens import TokenRows
from tasks.register import registry

#: Held-out rows that are compared.
ROWS = 8

#: The same weights, dtype, kernels and threads on the same processor give the same bits.
TOLERANCE = 0.0


def reload_difference(
    model_uri: str, tracking: str, paths: dict[str, Path], serving: dict[str, Any], scratch: Path
) -> float:
    """The largest difference of a logit, over a few held-out rows, of version and entry.

    Raises:
        StageError: the version cannot be loaded, or asks the model with other tokens.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    tokens = TokenRows.load(paths["prepared"] / "tokens" / "test.safetensors")
    rows = [tokens.row(index).tolist() for index in range(min(ROWS, len(tokens)))]
    expected = expected_logits(rows, paths, serving)
    got = reloaded_logits(model_uri, tracking, rows, scratch)
    return max(
        float((one - other).abs().max()) if one.shape == other.shape else float("inf")
        for one, other in zip(expected, got, strict=True)
    )


@torch.inference_mode()
def expected_logits(
    rows: list[list[int]], paths: dict[str, Path], serving: dict[str, Any]
) -> list[torch.Tensor]:
    """What the finished entry gives, one row at a time, float32: [T, vocabulary] or [classes]."""
    model = load_trained(
        paths["base"],
        paths["finished"] / "model",
        serving["task"],
        serving["labels"],
        serving["dtype"],
    )
    return [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]


def reloaded_logits(
    model_uri: str, tracking: str, rows: list[list[int]], scratch: Path
) -> list[torch.Tensor]:
    """What the version gives in a fresh process."""
    request, answer = scratch / "rows.json", scratch / "logits.safetensors"
    request.write_text(json.dumps(rows))
    threads = str(torch.get_num_threads())
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": threads,
    }
    command = [sys.executable, "-m", "tasks.register.verify", model_uri, str(request), str(answer)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode != 0:
        raise StageError(f"{model_uri} cannot be loaded back:\n{process.stderr[-2000:]}")
    logits = load_file(answer)
    return [logits[str(index)] for index in range(len(rows))]


def answer_request(model_uri: str, request: Path, answer: Path) -> None:
    """The fresh process: load the version, write its logits."""
    rows = json.loads(request.read_text())
    served = registry.load_served(model_uri, os.environ["MLFLOW_TRACKING_URI"])
    logits = [served.logits([row])[0] for row in rows]
    save_file({str(index): row.contiguous() for index, row in enumerate(logits)}, answer)


if __name__ == "__main__":
    answer_request(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
