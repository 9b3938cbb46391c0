"""The fresh process that loads a version back: `python -m tasks.register.reload URI ROWS DIR`.

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
    """Write the logits of each row's tokens, and the tokens that each row's text becomes."""
    rows, has_encoder = json.loads(request.read_text()).values()
    served = registry.load_served(model_uri, os.environ["MLFLOW_TRACKING_URI"])
    # One row at a time: padding changes sums, and the difference is to be zero.
    logits = {
        str(index): served.logits([tokens[:end]], [tokens[end:]])[0]
        if has_encoder
        else served.logits([tokens])[0]
        for index, (tokens, end, _) in enumerate(rows)
    }
    save_file(
        {name: row.contiguous() for name, row in logits.items()}, answer / "logits.safetensors"
    )
    longest = served.serving["max_new_tokens"]
    asked = [served.ask(text, longest) for _, _, text in rows]
    (answer / "asked.json").write_text(json.dumps(asked))


if __name__ == "__main__":
    answer_request(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
