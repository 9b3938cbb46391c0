"""`peftflow run` killed with SIGKILL while it trains: nothing lives on, nothing is lost."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.calls import Calls
from flows.home import Home
from flows.screen import Screen, console
from flows.work import Bench
from schemas.load import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Seconds for a machine that is busy with other tests as well.
PATIENCE_S = 240.0


def wait_for(condition: Callable[[], Any], child: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert child.poll() is None, "the run ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_to_the_same_bytes_and_is_crashed_in_prefect(
    tiny: Path,
    tree: dict[str, Any],
    tmp_path: Path,
    start: Callable[..., Any],
    processes_naming: Callable[[str], list[str]],
) -> None:
    tree = {**tree, "train": {**tree["train"], "max_steps": 30, "checkpoint_every_s": 0.0}}
    recipe = tmp_path / "long.yaml"
    recipe.write_text(yaml.safe_dump(tree))

    whole = Home(tmp_path / "whole")
    whole.open()
    calls = Calls(load_recipe(recipe), recipe, whole)
    bench = Bench(whole, Screen(console(stderr=True)))
    bench.make(calls.inspect())
    rows, _ = bench.make(calls.prepare())
    expected, _ = bench.make(calls.train(calls.recipe.candidates[0], rows))

    home = tmp_path / "killed"
    shutil.copytree(whole.store, home / "store", ignore=lambda *_: ["train"])
    shutil.copytree(whole.cache, home / "cache")
    place = home / "store" / "train"

    first = start("run", recipe, "--home", home)
    wait_for(lambda: list(place.glob(".work-*/scratch/checkpoint-*")), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (place / expected.key).exists(), "it was killed too late to show anything"
    deadline = time.monotonic() + 20
    while processes_naming(str(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_naming(str(home)) == []

    second = start("run", recipe, "--home", home)
    wait_for((place / expected.key).exists, second)
    second.terminate()
    second.wait()

    weights = "model/adapter_model.safetensors"
    assert (place / expected.key / weights).read_bytes() == (expected.path / weights).read_bytes()
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        states = database.execute("select state_type from flow_run order by start_time").fetchall()
    assert states[0] == ("CRASHED",)
