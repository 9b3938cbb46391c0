"""The committed figures say what they are of: a clean commit, a machine, a command that exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_result_names_its_origin(path: Path) -> None:
    record: dict[str, Any] = json.loads(path.read_text())
    origin = record["provenance"]
    assert origin.keys() == {
        *("commit", "dirty", "machine", "libraries", "python", "date", "command"),
    }
    assert len(origin["commit"]) == 40
    assert origin["dirty"] is False
    assert (ROOT / origin["command"].split()[1]).is_file()
    assert str(Path.home()) not in path.read_text()
    for row in record["rows"]:
        assert row.keys() == {"name", "value", "unit", "bar", "met"}
        assert (row["bar"] is None) == (row["met"] is None)


def test_every_benchmark_has_a_result() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"common"}
    # Of some there is one for each data set.
    stems = {re.sub("_(banking77|gsm8k|causal)$", "", path.stem) for path in RESULTS}
    assert scripts <= stems
