"""The fresh process that loads a version back: `python -m tasks.register.reload URI ROWS OUT`.

It knows of the entry nothing but the rows of tokens that it is asked with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from tasks.register import registry


def answer_request(model_uri: str, request: Path, answer: Path) -> None:
    """Write the logits of each row as the version gives them, one row at a time."""
    rows = json.loads(request.read_text())
    served = registry.load_served(model_uri, os.environ["MLFLOW_TRACKING_URI"])
    logits = [served.logits([row])[0] for row in rows]
    save_file({str(index): row.contiguous() for index, row in enumerate(logits)}, answer)


if __name__ == "__main__":
    answer_request(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
