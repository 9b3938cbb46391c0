"""A distillation killed at any moment ends in the bytes of one never killed.

The children are real `run` calls, killed with SIGKILL; one server process imports the libraries
once and forks a child for each attempt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tasks.turbo.stage import run

SERVER = """
import json, os, sys
from pathlib import Path
import tasks.turbo.stage
from schemas.stages import TurboSpec
print("ready", flush=True)
for line in sys.stdin:
    spec, paths, out = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.environ["PEFTFLOW_EVENTS"] = "1"
        sys.stdout = open(os.devnull, "w")
        found = {name: Path(path) for name, path in json.loads(paths).items()}
        tasks.turbo.stage.run(TurboSpec.model_validate_json(spec), found, Path(out))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def heads(out: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (out / "heads").iterdir()}
    assert len(found) == 2
    return found


def shards(count: int) -> Callable[[Path], bool]:
    return lambda scratch: len(list(scratch.glob("states-*/0*.safetensors"))) >= count


def writing_a_shard(scratch: Path) -> bool:
    return any(scratch.glob("states-*/.unfinished-*"))


def steps(count: int) -> Callable[[Path], bool]:
    return lambda scratch: any(
        int(path.name.removeprefix("checkpoint-")) >= count for path in scratch.glob("checkpoint-*")
    )


def saving(scratch: Path) -> bool:
    try:
        return any(scratch.glob(".unfinished-*/*"))
    except FileNotFoundError:  # it was finished while it was looked at
        return False


def never(scratch: Path) -> bool:
    return False


#: When to kill, in the order of a run; a condition that is missed only ends an attempt sooner.
MOMENTS = [
    (lambda scratch: True, "at the start"),
    (writing_a_shard, "while a shard is written"),
    (shards(1), "behind the first shard"),
    (shards(3), "between writing and learning"),
    (steps(1), "behind the first step"),
    (saving, "while a checkpoint is written"),
    (steps(20), "in the middle"),
    (saving, "while a later one is written"),
    (steps(50), "near the end"),
]


def test_killed_anywhere_ends_in_the_same_bytes(tmp_path, world, server) -> None:
    spec = world.spec(epochs=4, checkpoint_every_s=0)
    paths = json.dumps({name: str(path) for name, path in world.paths.items()})

    def start(out: Path) -> int:
        server.stdin.write("\t".join([spec.model_dump_json(), paths, str(out)]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    def wait() -> int:
        return int(server.stdout.readline())

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    start(whole)
    assert wait() == 0
    scratch = killed / "scratch"
    for moment, name in MOMENTS:
        child = start(killed)
        deadline = time.monotonic() + 30
        while not moment(scratch):
            assert time.monotonic() < deadline, f"{name}: it never came"
            time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
        assert wait() == -signal.SIGKILL, f"{name}: the run ended before it was killed"
    start(killed)
    assert wait() == 0
    assert heads(killed) == heads(whole)


def test_it_goes_on_with_the_threads_that_it_began_with(tmp_path, world, capfd) -> None:
    """Sums over threads are in another order, and the texts and states would be of two kinds."""
    spec = world.spec(epochs=4, checkpoint_every_s=0)
    run(spec, world.paths, tmp_path)
    first = heads(tmp_path)
    [directory] = (tmp_path / "scratch").glob("states-*")
    (directory / "00002.safetensors").unlink()
    for path in (tmp_path / "scratch").glob("checkpoint-*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    torch.set_num_threads(2)
    capfd.readouterr()
    facts = run(spec, world.paths, tmp_path)
    assert facts["threads"] == 1
    assert "were begun with 1 threads" in capfd.readouterr().err
    assert heads(tmp_path) == first


@pytest.mark.parametrize("lost", [0, 1])
def test_it_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path, world, capfd, lost) -> None:
    spec = world.spec(epochs=4, checkpoint_every_s=0)
    run(spec, world.paths, tmp_path)
    first = heads(tmp_path)
    newest = sorted((tmp_path / "scratch").glob("checkpoint-*"), reverse=True)
    for path in newest[:lost]:
        tensors = path / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    capfd.readouterr()
    facts = run(spec, world.paths, tmp_path)
    said = capfd.readouterr().err
    # There is none for the last step.
    assert f"going on from step {facts['steps'] - 1 - lost}" in said
    assert ("is damaged" in said) == bool(lost)
    assert heads(tmp_path) == first


def test_what_another_spec_left_is_not_used(tmp_path, world, capfd) -> None:
    run(world.spec(epochs=4, checkpoint_every_s=0), world.paths, tmp_path / "two")
    capfd.readouterr()
    hotter = world.spec(epochs=4, checkpoint_every_s=0, temperature=3.0)
    run(hotter, world.paths, tmp_path / "two")
    assert "another run" in capfd.readouterr().err
    run(hotter, world.paths, tmp_path / "one")
    assert heads(tmp_path / "two") == heads(tmp_path / "one")
