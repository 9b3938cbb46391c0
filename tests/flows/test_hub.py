"""Rows from a hub that is out of reach: told in seconds, and without its client's retries."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

#: Seconds from the command to the error. The client's own retries take 23.
SOON_S = 5.0


def test_hub_rows_out_of_reach_are_missed_soon(
    tmp_path: Path, tree: Any, peftflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = {"path": "hub:org/rows", "revision": "0" * 40}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tree, "data": {"train": rows, "test": {"holdout": 0.2}}}))
    command = ["check", recipe, "--home", tmp_path / "home", "--json"]
    peftflow(*command)  # leaves the inspection of the candidates, which asks no hub, in the store
    started = time.monotonic()
    ended = peftflow(*command)
    took_s = time.monotonic() - started
    assert ended.code == 2
    [error] = ended.record["errors"]
    assert error["place"] == "hub:org/rows"
    assert "give a file" in error["fix"]
    assert took_s < SOON_S
