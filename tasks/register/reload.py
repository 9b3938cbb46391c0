"""The fresh process that loads a version back: `python -m tasks.register.reload URI REQUEST DIR`.

It knows of the entry nothing but what it is asked with: rows as a model reads them, and the same
rows as a user of the version would send them.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from tasks.register import registry

ROWS = "rows.safetensors"


def answer_request(model_uri: str, request: Path, answer: Path) -> None:
    """Write the logits of each row, and what the version itself makes of each that is sent."""
    served = registry.load_served(model_uri, os.environ["MLFLOW_TRACKING_URI"])
    ends = json.loads((request / "ends.json").read_text())
    # One row at a time: padding changes sums, and the difference is to be zero.
    logits = {
        str(index): served.logits([row[:end]], None if end is None else [row[end:]])[0]
        for index, (row, end) in enumerate(zip(read_rows(request), ends, strict=True))
    }
    save_file(
        {name: row.contiguous() for name, row in logits.items()}, answer / "logits.safetensors"
    )
    longest = served.serving["max_new_tokens"]
    sent = json.loads((request / "asked.json").read_text())
    write_rows([served.ask(text, longest) for text in sent], answer)


def in_json(text: str | bytes) -> str:
    """What is sent, as JSON has it: bytes in base64."""
    return base64.b64encode(text).decode() if isinstance(text, bytes) else text


def write_rows(rows: list[Any], directory: Path) -> None:
    """Rows as a model reads them: ids, or the pixel values of an image."""
    arrays = {str(index): np.ascontiguousarray(row) for index, row in enumerate(rows)}
    save_arrays(arrays, directory / ROWS)


def read_rows(directory: Path) -> list[Any]:
    """The same rows: ids as a list, pixel values as an array."""
    found = load_file(directory / ROWS)
    rows = [found[str(index)] for index in range(len(found))]
    return [row.tolist() if row.ndim == 1 else row for row in rows]


if __name__ == "__main__":
    answer_request(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
