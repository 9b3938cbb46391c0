"""Hashes of outside files are remembered, and never for a file that may have changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from flows import remember
from flows.remember import Diverged, FileHashes, Memory
from schemas.errors import DivergedError


def settle(path: Path) -> None:
    """Make a file look old enough to be remembered."""
    old = time.time() - 60
    os.utime(path, (old, old))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    read: list[Path] = []

    def sha256(path: Path) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(remember, "sha256_file", sha256)
    return read


def test_a_settled_file_is_read_once_even_across_processes(
    tmp_path: Path, counted: list[Path]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    settle(file)
    expected = hashlib.sha256(b"one").hexdigest()
    assert [FileHashes(tmp_path / "h.json").of_file(file) for _ in range(3)] == [expected] * 3
    assert counted == [file]


def test_a_change_of_the_same_size_is_seen(tmp_path: Path) -> None:
    file, hashes = tmp_path / "rows.jsonl", FileHashes(tmp_path / "h.json")
    file.write_text("one")
    settle(file)
    before = hashes.of_file(file)
    file.write_text("two")
    assert hashes.of_file(file) != before


def test_a_fresh_file_is_not_remembered(tmp_path: Path, counted: list[Path]) -> None:
    # Two writes within the resolution of a time stamp look the same from outside.
    file, hashes = tmp_path / "rows.jsonl", FileHashes(tmp_path / "h.json")
    file.write_text("one")
    hashes.of_file(file)
    hashes.of_file(file)
    assert len(counted) == 2


def test_where_files_lie_does_not_count_and_their_names_do(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "h.json")
    for directory, name in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / name).write_text("same")
    at_a, at_b, other = (
        hashes.of_files([path]) for path in (tmp_path / "a/x", tmp_path / "b/x", tmp_path / "c/y")
    )
    assert at_a == at_b != other


def test_a_broken_memory_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("{not json")
    memory = Memory(path)
    assert memory.get("a") is None
    memory.put("a", 1)
    assert Memory(path).get("a") == 1


def test_what_diverged_is_known_to_those_who_looked_before_it_did(tmp_path: Path) -> None:
    """Several trainings are under way at once, and each has looked before it began."""
    one, other = Diverged(tmp_path / "diverged"), Diverged(tmp_path / "diverged")
    for each in (one, other):
        each.check("a")
        each.check("b")
    one.put("a", DivergedError("at step 3"))
    other.put("b", DivergedError("at step 5"))
    for key, words in (("a", "step 3"), ("b", "step 5")):
        with pytest.raises(DivergedError, match=words):
            one.check(key)
    one.check("c")
