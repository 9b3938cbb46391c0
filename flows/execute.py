"""One stage as a child process: its events are passed on, its errors become exceptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.home import Home
from schemas.errors import STAGE_ERRORS, Problem, StageError, UserError
from schemas.stages import Call, TrainSpec
from tasks.core.store import Entry, key_of, read_manifest
from tasks.train import heap

Event = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
BOUND = Path(__file__).with_name("bound.py")

#: Lines of a child's standard error that are shown when it fails without a word of its own.
TAIL_LINES = 12


def run_stage(
    call: Call,
    home: Home,
    on_event: Callable[[Event], None],
    *,
    offline: bool = True,
    slot: dict[str, str] | None = None,
    package: str = "tasks",
) -> Entry:
    """Make the entry of `call` in a process of its own: `python -m <package>.<stage>`.

    Events of kind progress, note and warning go to `on_event` as they come. The child's standard
    error is kept in the home's `logs/`. slot: variables that give it a share of the machine.

    Raises:
        UserError: the stage found the input wrong.
        RetryableError: it could not finish now, and may later (DiskFullError: when there is room).
        StageError: it failed; the message ends with where its log is.
    """
    log = log_of(call, home)
    with tempfile.NamedTemporaryFile("w", suffix=".json", dir=home.cache) as file:
        file.write(call.model_dump_json())
        file.flush()
        command = stage_command(f"{package}.{call.stage}", file.name, home)
        environment = home.environment(offline=offline) | (slot or {}) | {"PEFTFLOW_EVENTS": "1"}
        if call.stage == TrainSpec.STAGE:
            environment |= heap.environment(environment)
        with log.open("wb") as errors, bound(command, environment, errors) as child:
            last = _relay(child, on_event)
            code = child.wait()
    return _made(call, code, last, log)


@contextmanager
def ahead(stage: str, home: Home, package: str = "tasks") -> Iterator[Callable[[Call], Entry]]:
    """A stage whose process imports what it needs while its call is not known yet. It is told the
    call by what this gives, which answers as `run_stage` does, once.

    It ends with the block, told or not.
    """
    command = stage_command(f"{package}.{stage}", "-", home)
    environment = home.environment() | {"PEFTFLOW_EVENTS": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        bound(command, environment, errors, stdin=subprocess.PIPE) as child,
    ):

        def tell(call: Call) -> Entry:
            assert call.stage == stage
            tell_child(child, call.model_dump_json())
            last = _relay(child, lambda event: None)
            code = child.wait()
            errors.seek(0)
            log = log_of(call, home)
            log.write_bytes(errors.read())
            return _made(call, code, last, log)

        yield tell


def tell_child(child: subprocess.Popen[bytes], words: str) -> None:
    """Write to a child's standard input, and end it. One that has died says so by its code."""
    assert child.stdin is not None
    with suppress(BrokenPipeError), child.stdin as pipe:
        pipe.write(words.encode())


def stage_command(module: str, call: str, home: Home) -> list[str]:
    """call: a file, or - for standard input."""
    # -P: a directory named `tasks` where the user stands must not be taken for ours.
    return [sys.executable, "-P", "-m", module, call, "--store", str(home.store)]


def log_of(call: Call, home: Home) -> Path:
    return home.logs / f"{call.stage}-{key_of(call)[:12]}.log"


#: Stages under way, of whatever thread.
RUNNING: set[subprocess.Popen[bytes]] = set()


def end_all() -> None:
    """End the stages of all threads: theirs raise StageErrors soon after. For an interruption,
    which comes to the main thread alone."""
    for child in list(RUNNING):
        if child.poll() is None:
            os.kill(child.pid, signal.SIGTERM)


@contextmanager
def bound(
    command: list[str], environment: dict[str, str], errors: Any, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that does not outlive this process, nor this block (`flows/bound.py`)."""
    child = start_bound(command, environment, subprocess.PIPE, errors, stdin)
    RUNNING.add(child)
    try:
        yield child
    finally:
        RUNNING.discard(child)
        if child.poll() is None:
            os.kill(child.pid, signal.SIGTERM)
            child.wait()
        for pipe in (child.stdout, child.stdin):
            if pipe is not None:
                pipe.close()


def start_bound(
    command: list[str],
    environment: dict[str, str],
    stdout: Any,
    stderr: Any,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a command that ends when this process ends. Call it from a thread that lives on."""
    path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(BOUND), str(os.getpid()), *command],
        env=environment | {"PYTHONPATH": path},
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
    )


def _relay(child: subprocess.Popen[bytes], on_event: Callable[[Event], None]) -> Event | None:
    """Pass the child's events on until it ends; the last one that decides, or None."""
    assert child.stdout is not None
    last: Event | None = None
    for line in child.stdout:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            text = line.decode(errors="replace").rstrip()
            event = {"event": "note", "message": text}
        if event["event"] in ("entry", "user_error", "failure"):
            last = event
        else:
            on_event(event)
    return last


def _made(call: Call, code: int, last: Event | None, log: Path) -> Entry:
    """What a child has made, once it has ended."""
    if code == 0 and last is not None and last["event"] == "entry":
        path = Path(last["message"])
        return Entry(path, read_manifest(path))
    raise _failure(call, code, last, log)


def _failure(call: Call, code: int, last: Event | None, log: Path) -> Exception:
    """A child's end as an exception."""
    if last is not None and last["event"] == "user_error":
        return UserError([Problem(**problem) for problem in last["problems"]])
    if last is not None and last["event"] == "failure":
        kind = STAGE_ERRORS[last["kind"]]
        return kind(f"{call.stage}: {last['message']}\n    log: {log}")
    if code > 128:
        name = signal.Signals(code - 128).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return StageError(f"{call.stage} was ended by {name}{hint}\n    log: {log}")
    with log.open(errors="replace") as file:
        tail = "".join(deque(file, TAIL_LINES)).rstrip()
    return StageError(f"{call.stage} ended with code {code} and no word\n{tail}\n    log: {log}")
