"""Makes the rows of recipes/restaurant8k-slots.yaml: texts with the characters of their slots.

    cd recipes && python restaurant8k_spans.py data/restaurant8k_{,spans_}train.jsonl
    cd recipes && python restaurant8k_spans.py data/restaurant8k_{,spans_}test.jsonl

The files give each slot's value, not its place. A value that stands in its text exactly once as
whole words has its place there; a row with any other value, or with two slots in one place, is
left out and counted: where it stands cannot be known.
"""

from __future__ import annotations

import argparse
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any


def spans_of(text: str, slots: dict[str, str]) -> list[dict[str, Any]] | None:
    """The slots by their places in the text, or None: one of them is not known."""
    spans = []
    for label, value in slots.items():
        places = list(re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text))
        if len(places) != 1:
            return None
        spans.append({"start": places[0].start(), "end": places[0].end(), "label": label})
    spans.sort(key=lambda span: span["start"])
    apart = all(one["end"] <= other["start"] for one, other in pairwise(spans))
    return spans if apart else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    lines, left_out = [], 0
    for line in arguments.source.read_text().splitlines():
        row = json.loads(line)
        spans = spans_of(row["prompt"], json.loads(row["completion"]))
        if spans is None:
            left_out += 1
        else:
            lines.append(json.dumps({"text": row["prompt"], "spans": spans}))
    arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} rows, {left_out} left out: {arguments.out}")


if __name__ == "__main__":
    main()
