"""`dtype: auto` as flows tell it is what the compute rooms mean by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import machine
from flows.home import Home
from schemas.errors import StageError
from tasks.core import runtime


def test_agrees_with_the_runtime_and_asks_torch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    home.open()
    assert machine.resolve_dtype("auto", home) == runtime.resolve_dtype("auto")
    monkeypatch.setattr(machine, "PROBE", "raise SystemExit('asked again')")
    assert machine.resolve_dtype("auto", home) == runtime.resolve_dtype("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "another device")
    with pytest.raises(StageError, match="asked again"):
        machine.resolve_dtype("auto", home)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_recipe_says_is_taken(tmp_path: Path, dtype: str) -> None:
    assert machine.resolve_dtype(dtype, Home(tmp_path)) == dtype
