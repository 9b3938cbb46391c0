"""OUT is whole or absent, whatever happens."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from schemas.errors import DiskFullError, UserError
from tasks.export.formats import export
from tasks.export.place import whole_or_absent

ROOT = Path(__file__).resolve().parents[3]


def test_what_was_written_becomes_the_directory(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with whole_or_absent(out) as work:
        (work / "inner").mkdir()
        (work / "inner" / "file").write_text("whole")
        assert not out.exists()
    assert (out / "inner" / "file").read_text() == "whole"
    assert list(out.parent.iterdir()) == [out]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_or_absent(tmp_path / "out") as work:
        (work / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_there_stays(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "elsewhere")
    before = list(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is there already"), whole_or_absent(out):
        pass
    assert list(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_or_absent(tmp_path / "out") as work:
            (work / "file").write_text("half")
            raise error

    with pytest.raises(DiskFullError, match="out: the disk is full, and nothing was left there"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    out = tmp_path / "file" / "out"
    with pytest.raises(UserError, match="may not be used"), whole_or_absent(out):
        pass


def test_any_other_error_leaves_nothing(made: Any, tmp_path: Path) -> None:
    world = made("whole", rank=None)
    with pytest.raises(UserError):
        export(world.version, "tgi", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from tasks.export.place import whole_or_absent
with whole_or_absent(Path(sys.argv[1])) as work:
    (work / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_leaves_no_out_and_the_next_one_goes_through(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert not out.exists()
    assert list(tmp_path.iterdir()), "the test kills too early"
    with whole_or_absent(out) as work:
        (work / "file").write_text("whole")
    assert [path.name for path in out.iterdir()] == ["file"]
    assert list(tmp_path.iterdir()) == [out]


def test_two_exports_to_one_place_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with whole_or_absent(out) as work:
        (work / "file").write_text("the first")
        with pytest.raises(UserError, match="another export is"), whole_or_absent(out):
            pass
        assert (work / "file").exists()
    assert (out / "file").read_text() == "the first"
