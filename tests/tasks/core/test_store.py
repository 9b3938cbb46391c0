"""An entry is whole or does not exist, whatever happens while it is made."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import DiskFullError, UserError
from schemas.stages import Call
from tasks.core.files import canonical_json, write_atomic
from tasks.core.store import MANIFEST, Store, damage, key_of, storage_errors


def call(**changes: object) -> Call:
    fields: dict[str, object] = {
        "stage": "prepare",
        "stage_version": 1,
        "format": "rows",
        "spec": {"rate": 0.1},
        "paths": {"train": "/somewhere/a.jsonl"},
        "inputs": {"base": "aa"},
        "outside": {"train": "bb"},
    }
    return Call.model_validate({**fields, **changes})


def write_two(out: Path) -> dict[str, object]:
    (out / "model").mkdir(exist_ok=True)
    (out / "model" / "a.bin").write_bytes(b"a" * 10_000)
    (out / "b.json").write_text("{}")
    (out / "scratch").mkdir(exist_ok=True)
    (out / "scratch" / "checkpoint").write_text("not part of the entry")
    return {"rows": 3}


def test_made_once_then_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = store.make(call(), write_two)
    assert made.facts == {"rows": 3}
    assert set(made.manifest.files) == {"model/a.bin", "b.json"}
    again = store.make(call(), lambda out: pytest.fail("made twice"))
    assert again.manifest == made.manifest
    assert [entry.key for entry in store.entries()] == [made.key]


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "train"},
        {"stage_version": 2},
        {"spec": {"rate": 0.2}},
        {"inputs": {"base": "ab"}},
        {"outside": {"train": "bc"}},
    ],
)
def test_key_follows_what_the_stage_reads(change: dict[str, object]) -> None:
    assert key_of(call()) != key_of(call(**change))


def test_key_ignores_places() -> None:
    assert key_of(call()) == key_of(call(paths={"train": "/elsewhere/b.jsonl"}))


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest"])
def test_damage_is_found_set_aside_and_made_again(
    tmp_path: Path, harm: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    made = store.make(call(), write_two)
    victim = made.path / "model" / "a.bin"
    content = bytearray(victim.read_bytes())
    if harm == "flip":
        content[5000] ^= 1
        victim.write_bytes(content)
    elif harm == "cut":
        victim.write_bytes(content[:-1])
    elif harm == "remove":
        victim.unlink()
    else:
        (made.path / MANIFEST).write_text('{"stage": "prep')
    assert damage(made.path)
    again = store.make(call(), write_two)
    assert damage(again.path) is None
    assert "is damaged" in capfd.readouterr().err
    assert len(list((tmp_path / "prepare").glob(".bad-*"))) == 1


def test_a_manifest_that_cannot_be_read_is_left_out_of_listings_aloud(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    made = store.make(call(), write_two)
    torn = store.make(call(spec={"rate": 0.2}), write_two)
    (torn.path / MANIFEST).write_text('{"stage": "prep')
    assert [entry.key for entry in store.entries("prepare")] == [made.key]
    assert f"{torn.path / MANIFEST} cannot be read" in capfd.readouterr().err


def test_failed_stage_leaves_no_entry_but_its_scratch(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail(out: Path) -> dict[str, object]:
        write_two(out)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.make(call(), fail)
    assert store.find(call()) is None
    assert list(store.entries()) == []
    seen: list[bool] = []

    def go_on(out: Path) -> dict[str, object]:
        seen.append((out / "scratch" / "checkpoint").exists())
        return write_two(out)

    store.make(call(), go_on)
    assert seen == [True]


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def refuse(out: Path) -> dict[str, object]:
        write_two(out)
        raise UserError.at("rows.jsonl:3", "is empty", "fill it")

    with pytest.raises(UserError, match="is empty"):
        store.make(call(), refuse)
    assert [path.name for path in (tmp_path / "prepare").iterdir() if path.is_dir()] == []


KILLED = """
import sys, time
from pathlib import Path
from schemas.stages import Call
from tasks.core.store import Store
call = Call.model_validate_json(Path(sys.argv[1]).read_text())
def run(out):
    print("started", flush=True)
    for number in range(200):
        (out / f"{number}.bin").write_bytes(bytes([number]) * 20_000)
    return {}
Store(Path(sys.argv[2])).make(call, run)
print("made", flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_whole_entry_or_none(tmp_path: Path) -> None:
    request = tmp_path / "call.json"
    request.write_text(call().model_dump_json())
    store = Store(tmp_path / "store")
    outcomes = set()
    for delay_s in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(request), str(store.root)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay_s)
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = store.find(call())
        outcomes.add(found is not None)
        if found is not None:
            assert len(found.manifest.files) == 200
    entry = store.make(call(), lambda out: {})
    assert damage(entry.path) is None


def test_two_makers_make_one_entry(tmp_path: Path) -> None:
    request = tmp_path / "call.json"
    request.write_text(call().model_dump_json())
    command = [sys.executable, "-c", KILLED, str(request), str(tmp_path / "store")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [child.communicate()[0] for child in children]
    assert all("made" in output for output in outputs)
    assert sum("started" in output for output in outputs) == 1


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, DiskFullError, "disk is full"),
        (errno.EROFS, UserError, "--home"),
        (errno.EACCES, UserError, "--home"),
    ],
)
def test_storage_errors_have_a_fix(
    tmp_path: Path, number: int, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words), storage_errors(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_file_elsewhere_is_named_and_not_the_home(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/train.jsonl")
    problem = caught.value.problems[0]
    assert problem.place == "/data/train.jsonl"
    assert "make it readable" in problem.fix
    inside = str(tmp_path / "prepare" / "manifest.json")
    with pytest.raises(UserError, match="--home"), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), inside)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_a_full_disk_that_is_no_oserror(tmp_path: Path, error: Exception) -> None:
    # As safetensors and SQLite were seen to say it.
    with pytest.raises(DiskFullError, match="Free some space"), storage_errors(tmp_path):
        raise error


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        store = Store(disk / "store")

        def fill(out: Path) -> dict[str, object]:
            (out / "big").write_bytes(b"x" * 1_000_000)
            return {}

        with pytest.raises(DiskFullError, match="disk is full"):
            store.make(call(), fill)
        assert store.find(call()) is None
    finally:
        subprocess.run(["umount", disk], check=True)


def test_write_atomic_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, "old")
    with pytest.raises(TypeError):
        write_atomic(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(), values))
def test_canonical_json_has_one_spelling(value: dict[str, object]) -> None:
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(backwards)
