"""Promotion under a lock: one winner, an unbroken ledger, and nothing lost in a crash."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from schemas.errors import RetryableError, StageError, UserError
from schemas.report import LedgerEntry
from tasks.register.ledger import Ledger
from tasks.register.promote import champion, ledger, promote, rollback

ROOT = Path(__file__).parents[3]
NAME = "model"
GATE = {"accuracy": ">= 0.9"}

AddVersion = Callable[..., str]


def chain(entries: list[LedgerEntry]) -> list[str | None]:
    """Every champion in turn; each line must begin where the one before it ended."""
    assert all(before.to_version == after.from_version for before, after in pairwise(entries))
    return [entries[0].from_version, *(entry.to_version for entry in entries)] if entries else []


def test_promote_and_roll_back(home: Path, add_version: AddVersion) -> None:
    one, two, three = (add_version(NAME) for _ in range(3))
    for version in (one, two, three):
        promotion = promote(home, NAME, version, "weekly", GATE)
        assert promotion.promoted
        assert promotion.entry is not None
    assert chain(ledger(home, NAME)) == [None, one, two, three]
    assert rollback(home, NAME).to_version == two
    assert champion(home, NAME) == two
    assert rollback(home, NAME, "worse on Monday").to_version == one
    with pytest.raises(UserError, match=f"no champion before {one}"):
        rollback(home, NAME)
    entries = ledger(home, NAME)
    assert chain(entries) == [None, one, two, three, two, one]
    assert entries[-1].why == "worse on Monday"
    assert [entry.action for entry in entries] == ["promote"] * 3 + ["rollback"] * 2


def test_the_ledger_says_who_and_when(home: Path, add_version: AddVersion) -> None:
    before = datetime.now(UTC)
    one, two = add_version(NAME), add_version(NAME)
    promote(home, NAME, one, "first", GATE)
    promote(home, NAME, two, "second", GATE)
    rollback(home, NAME)
    entries = ledger(home, NAME)
    assert [entry.who for entry in entries] == [getpass.getuser()] * 3
    whens = [datetime.fromisoformat(entry.when) for entry in entries]
    assert all(when.utcoffset() == timedelta(0) for when in whens)
    assert before <= whens[0] < whens[1] < whens[2] <= datetime.now(UTC)


def test_promoting_the_champion_again_changes_nothing(home: Path, add_version: AddVersion) -> None:
    version = add_version(NAME)
    promote(home, NAME, version, "first", GATE)
    again = promote(home, NAME, version, "second", GATE)
    assert again.promoted
    assert again.entry is None
    assert len(ledger(home, NAME)) == 1


def test_the_gate_refuses(home: Path, add_version: AddVersion) -> None:
    good, bad = add_version(NAME, 0.95), add_version(NAME, 0.85)
    promote(home, NAME, good, "", GATE)
    refused = promote(home, NAME, bad, "", GATE)
    assert not refused.promoted
    assert not refused.verdict.passed
    assert refused.verdict.checks[0].value == 0.85
    assert champion(home, NAME) == good
    assert len(ledger(home, NAME)) == 1
    unknown = promote(home, NAME, bad, "", {"acuracy": ">= 0.5"})
    assert not unknown.promoted
    assert "did you mean accuracy?" in unknown.verdict.checks[0].note


def test_a_late_promotion_is_refused(home: Path, add_version: AddVersion) -> None:
    one, two = add_version(NAME), add_version(NAME)
    promote(home, NAME, one, "", GATE, expected=None)
    with pytest.raises(StageError, match="another promotion came first"):
        promote(home, NAME, two, "", GATE, expected=None)
    assert champion(home, NAME) == one


def test_a_server_that_is_away_is_said_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:hunter2@127.0.0.1:9")
    with pytest.raises(RetryableError, match="does not answer") as caught:
        promote(tmp_path, NAME, "1", "", GATE)
    assert "127.0.0.1:9" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


RIVAL = """
import json, sys, time
from pathlib import Path
from schemas.errors import StageError
from tasks.register.promote import champion, promote

home, number, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for round_ in range(rounds):
    seen = champion(home, "model")
    (home / f"ready-{round_}-{number}").touch()
    while len(list(home.glob(f"ready-{round_}-*"))) < 8:
        time.sleep(0.005)
    version = str(1 + 8 * round_ + number)
    try:
        promotion = promote(home, "model", version, "race", {}, expected=seen)
        print(json.dumps([round_, version, seen, promotion.promoted]), flush=True)
    except StageError:
        print(json.dumps([round_, version, seen, False]), flush=True)
    (home / f"done-{round_}-{number}").touch()
    while len(list(home.glob(f"done-{round_}-*"))) < 8:
        time.sleep(0.005)
"""


def test_of_eight_promoters_exactly_one_wins(home: Path, add_version: AddVersion) -> None:
    """Each read the same champion before any of them promoted, in three rounds."""
    rounds = 3
    for _ in range(8 * rounds):
        add_version(NAME)
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(home), str(number), str(rounds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    results = [json.loads(line) for rival in rivals for line in rival.communicate()[0].splitlines()]
    assert all(rival.returncode == 0 for rival in rivals)
    assert len(results) == 8 * rounds
    winners = sorted((round_, version) for round_, version, _, promoted in results if promoted)
    assert [round_ for round_, _ in winners] == list(range(rounds))
    assert chain(ledger(home, NAME)) == [None, *(version for _, version in winners)]
    assert champion(home, NAME) == winners[-1][1]


#: Dies at a place inside the promotion of version 2, as SIGKILL would have it.
CRASH = """
import os, signal, sys
from pathlib import Path
from tasks.register import ledger, registry
from tasks.register.promote import promote

home, place, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def torn(self, entry):
    with self.path.open("ab") as file:
        file.write(entry.model_dump_json().encode()[:40])
        file.flush()
        die()

if place == "before the alias":
    registry.set_alias = die
elif place == "after the alias":
    ledger.Ledger.commit = die
elif place == "in the line":
    ledger.Ledger.commit = torn
elif place == "after the line":
    os.fsync = lambda _: None
    ledger.fsync_path = die
promote(home, name, "2", "crash", {})
"""


def test_a_crash_between_alias_and_ledger_is_settled(home: Path, add_version: AddVersion) -> None:
    happened = {
        "before the alias": False,
        "after the alias": True,
        "in the line": True,
        "after the line": True,
    }
    names = {place: place.replace(" ", "-") for place in happened}
    for name in names.values():
        for _ in range(3):
            add_version(name)
        promote(home, name, "1", "", GATE)
    crashed = {
        place: subprocess.Popen(
            [sys.executable, "-c", CRASH, str(home), place, name], cwd=ROOT, stderr=subprocess.PIPE
        )
        for place, name in names.items()
    }
    for place, process in crashed.items():
        error = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, (place, error)
    for place, name in names.items():
        assert Ledger(home, name).intent.exists()
        promote(home, name, "3", "after", GATE)
        between = ["2"] if happened[place] else []
        assert chain(ledger(home, name)) == [None, "1", *between, "3"], place
        assert champion(home, name) == "3"
        assert rollback(home, name).to_version == ("2" if happened[place] else "1")


def test_a_lock_goes_with_its_process(home: Path, add_version: AddVersion) -> None:
    version = add_version(NAME)
    code = f"""
import time
from pathlib import Path
from tasks.register.ledger import Ledger
with Ledger(Path({str(home)!r}), "model").locked():
    Path({str(home / "held")!r}).touch()
    time.sleep(600)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (home / "held").exists():
        time.sleep(0.01)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert promote(home, NAME, version, "", GATE).promoted
