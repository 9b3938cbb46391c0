"""`dtype: auto` as flows tell it is what the compute rooms mean by it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from flows import cli, doctor, machine, rate
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


def test_one_process_tells_the_dtype_and_the_rate_and_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    home.open()
    with rate.rates("auto", home) as asked:
        dtype = machine.known_dtype("auto", home)
        assert dtype == runtime.resolve_dtype("auto")
        found = asked(dtype)
    assert found > 0
    with monkeypatch.context() as without:
        without.setattr(rate, "bound", None)
        with rate.rates("auto", home) as asked:
            assert asked(dtype) == found
    # Another machine, which has no such device.
    monkeypatch.setenv("PEFTFLOW_DEVICE", "nowhere")
    with (
        rate.rates(dtype, home) as asked,
        pytest.raises(StageError, match=r"cannot be timed:(.|\n)*nowhere"),
    ):
        asked(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_recipe_says_is_taken(tmp_path: Path, dtype: str) -> None:
    assert machine.resolve_dtype(dtype, Home(tmp_path)) == dtype


def test_doctor_says_that_torch_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "gpus", lambda: ["nvidia0"])
    found = doctor.examine(Home(tmp_path))
    broken = {finding.what for finding in found if finding.verdict == "broken"}
    assert {"processor", "accelerator"} <= broken
    with pytest.raises(SystemExit) as ended:
        cli.doctor(tmp_path)
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "torch is not installed" in told.out
    assert "Traceback" not in told.err
