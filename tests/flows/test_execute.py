"""Stages as child processes: real ones, of a package that this test writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.execute import RUNNING, Event, ahead, run_stage
from flows.home import Home
from schemas.errors import DiskFullError, RetryableError, StageError, UserError
from schemas.stages import Call

STAGE = """
import os, signal, sys, time
from schemas.errors import DiskFullError, Problem, RetryableError, StageError, UserError
from schemas.stages import Spec
from tasks.core.progress import bar, say, warn
from tasks.core.stage import main

class Act(Spec):
    does: str

def run(spec, paths, out):
    if spec.does == "makes":
        say("a note"); warn("a warning"); print("a stray line")
        with bar("rows", 3, "rows") as rows:
            rows.advance(3, loss=0.5)
        (out / "file").write_text(os.environ.get("HF_HUB_OFFLINE", "online"))
        return {"rows": 3}
    if spec.does == "user":
        raise UserError([Problem("a:1", "one", "first"), Problem("b:2", "two", "second")])
    if spec.does == "retryable":
        raise RetryableError("a server is away")
    if spec.does == "full":
        raise DiskFullError("the disk is full")
    if spec.does == "terminal":
        raise StageError("diverged")
    if spec.does == "bug":
        raise KeyError("a bug")
    if spec.does == "silent":
        print("last words", file=sys.stderr, flush=True); os._exit(7)
    if spec.does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    main(Act, run)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home, and a package `fakes` with one stage `act` that children can import."""
    package = tmp_path / "code" / "fakes" / "act"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    made = Home(tmp_path / "home")
    made.open()
    return made


def act(home: Home, does: str, on_event: Any = lambda event: None, **options: Any) -> Any:
    call = Call(stage="act", stage_version=1, format="rows", spec={"does": does}, paths={})
    return run_stage(call, home, on_event, package="fakes", **options)


def test_an_entry_is_made_and_every_event_comes_through(home: Home) -> None:
    events: list[Event] = []
    entry = act(home, "makes", events.append)
    assert entry.facts == {"rows": 3}
    assert [event["event"] for event in events] == ["note", "warning", "note", "progress"]
    assert events[2]["message"] == "a stray line"
    assert events[3]["done"] == events[3]["total"] == 3
    assert events[3]["figures"] == {"loss": 0.5}


def test_children_may_reach_the_hub_only_when_told(home: Home) -> None:
    assert (act(home, "makes").path / "file").read_text() == "1"


def test_every_problem_of_the_user_comes_back_with_place_and_fix(home: Home) -> None:
    with pytest.raises(UserError) as caught:
        act(home, "user")
    assert [(p.place, p.found, p.fix) for p in caught.value.problems] == [
        ("a:1", "one", "first"),
        ("b:2", "two", "second"),
    ]
    assert [path.name for path in home.store.rglob("*")] == ["act"]  # nothing else is left


def test_what_may_succeed_later_is_told_from_what_will_not(home: Home) -> None:
    with pytest.raises(RetryableError, match="server is away") as away:
        act(home, "retryable")
    assert not isinstance(away.value, DiskFullError)
    with pytest.raises(DiskFullError, match="disk is full"):
        act(home, "full")
    with pytest.raises(StageError, match="diverged") as caught:
        act(home, "terminal")
    assert not isinstance(caught.value, RetryableError)


@pytest.mark.parametrize(
    ("does", "words"),
    [("bug", "a bug"), ("silent", "code 7.*\n.*last words"), ("killed", "SIGKILL")],
)
def test_an_unforeseen_end_says_what_is_known_and_names_the_log(
    home: Home, does: str, words: str
) -> None:
    with pytest.raises(StageError, match=words) as caught:
        act(home, does)
    log = Path(str(caught.value).rsplit("log: ", 1)[1])
    assert log.is_file()
    if does == "bug":
        assert "Traceback" in log.read_text()


def test_a_directory_named_tasks_is_not_taken_for_ours(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    assert act(home, "makes").facts == {"rows": 3}


def call_of(does: str) -> Call:
    return Call(stage="act", stage_version=1, format="rows", spec={"does": does}, paths={})


def test_a_process_that_started_ahead_makes_what_it_is_told(home: Home) -> None:
    with ahead("act", home, package="fakes") as make:
        entry = make(call_of("makes"))
    assert entry.facts == {"rows": 3}
    assert entry.path == act(home, "makes").path
    assert not RUNNING


@pytest.mark.parametrize(
    ("does", "kind", "words"),
    [
        ("user", UserError, "second"),
        ("bug", StageError, "a bug"),
        ("silent", StageError, "code 7.*\n.*last words"),
        ("killed", StageError, "SIGKILL"),
    ],
)
def test_one_that_started_ahead_fails_as_others_do(
    home: Home, does: str, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught, ahead("act", home, package="fakes") as make:
        make(call_of(does))
    if kind is StageError:
        assert Path(str(caught.value).rsplit("log: ", 1)[1]).is_file()


def test_one_that_started_ahead_ends_untold_with_its_block(home: Home) -> None:
    with ahead("act", home, package="fakes"):
        [child] = RUNNING
    assert child.poll() is not None
    assert not RUNNING


def test_one_that_died_before_it_was_told_says_so(home: Home) -> None:
    with ahead("nothing", home, package="fakes") as make:
        [child] = RUNNING
        child.wait()
        with pytest.raises(StageError, match="log:"):
            make(call_of("makes").model_copy(update={"stage": "nothing"}))
