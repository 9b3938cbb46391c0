"""The command line: exit codes, JSON, what it leaves behind and what it does not import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.cli import guarded
from flows.home import Home
from flows.records import RunRecord
from schemas.errors import DiskFullError, RetryableError, StageError

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_bad_recipe_gives_every_error_at_once_and_imports_nothing_heavy(
    tmp_path: Path, peftflow: Any, tree: Any, heavy_imports: Any
) -> None:
    bad = {**tree, "candidates": [{"method": "lara"}], "trian": {}}
    recipe = write(tmp_path / "bad.yaml", bad)
    home = tmp_path / "home"
    ended = peftflow("run", recipe, "--home", home, "--json", python=("-X", "importtime"))
    assert ended.code == 2
    assert ended.record["state"] == "wrong-input"
    fixes = " ".join(error["fix"] for error in ended.record["errors"])
    assert "`lora`" in fixes
    assert "`train`" in fixes
    assert not heavy_imports(ended.err)
    assert not home.exists()  # nothing was begun


def test_people_read_the_same_errors_with_place_and_fix(
    tmp_path: Path, peftflow: Any, tree: Any
) -> None:
    recipe = write(tmp_path / "bad.yaml", {**tree, "candidates": [{"method": "lora", "rnk": 4}]})
    ended = peftflow("check", recipe, "--home", tmp_path / "home")
    assert ended.code == 2
    assert "candidates[0].rnk" in ended.out
    assert "fix:" in ended.out
    assert "`rank`" in ended.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such.yaml"],
        ["run", "{odd}"],
        ["run"],
        ["explode"],
        ["report"],
        ["report", "no-such-run"],
    ],
)
def test_what_the_user_got_wrong_is_exit_2(
    tmp_path: Path, arguments: list[str], peftflow: Any
) -> None:
    odd = tmp_path / "odd.yaml"
    odd.write_text("name: a\x00b\n")
    arguments = [argument.format(odd=odd) for argument in arguments]
    home = [] if arguments in (["run"], ["explode"]) else ["--home", tmp_path / "home"]
    assert peftflow(*arguments, *home).code == 2


def test_a_home_that_cannot_be_written_is_exit_2(tiny: Path, peftflow: Any) -> None:
    ended = peftflow("run", tiny, "--home", "/proc/peftflow", "--json")
    assert ended.code == 2
    assert ended.record["errors"][0]["place"] == "/proc/peftflow"


def test_a_wrong_row_file_leaves_the_store_as_it_was(
    tmp_path: Path, peftflow: Any, tree: Any
) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    data = {"train": {"path": "rows.csv"}, "test": {"holdout": 0.2}}
    recipe = write(tmp_path / "recipe.yaml", {**tree, "data": data})
    ended = peftflow("check", recipe, "--home", tmp_path / "home", "--json")
    assert ended.code == 2
    assert "rows.csv" in ended.record["errors"][0]["place"]
    left = list((tmp_path / "home" / "store" / "prepare").rglob("*"))
    assert left == []


@pytest.mark.parametrize(
    ("error", "code", "state"),
    [
        (StageError("diverged"), 1, "failed"),
        (RetryableError("the MLflow server does not answer"), 1, "failed"),
        (DiskFullError("the disk is full"), 2, "wrong-input"),
    ],
)
def test_what_no_input_caused_is_exit_1_and_a_full_disk_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, code: int, state: str
) -> None:
    def work(*_: object) -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        guarded(work, tmp_path, as_json=True)
    assert ended.value.code == code
    errors = [{"place": "", "found": str(error), "fix": getattr(error, "FIX", "")}]
    assert json.loads(capsys.readouterr().out) == {"state": state, "errors": errors}


def test_a_run_that_failed_gives_its_whole_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path)
    home.open()
    record = RunRecord(run_id="r1", recipe="tiny.yaml", name="tiny", mlflow_run="m1")

    def work(*_: object) -> int:
        record.state, record.errors = "failed", [{"place": "", "found": "diverged", "fix": ""}]
        record.save(home)
        raise StageError("diverged")

    with pytest.raises(SystemExit):
        guarded(work, tmp_path, as_json=True)
    assert RunRecord.model_validate_json(capsys.readouterr().out) == record


def test_a_run_that_failed_can_be_looked_at(tmp_path: Path, peftflow: Any) -> None:
    home = Home(tmp_path)
    home.open()
    error = {"place": "rows.csv:[3]", "found": "is empty", "fix": "fill it"}
    record = RunRecord(run_id="r1", recipe="tiny.yaml", name="tiny", state="failed", errors=[error])
    record.save(home)
    shown = peftflow("report", "r1", "--home", tmp_path)
    assert shown.code == 0, shown.err
    for words in ("failed", "rows.csv:[3]", "is empty", "fix: fill it"):
        assert words in shown.out
    assert peftflow("report", "r1", "--home", tmp_path, "--json").record["errors"] == [error]
    assert peftflow("report", "--home", tmp_path).code == 2  # none has come to a report


def test_status_of_a_new_home(tmp_path: Path, peftflow: Any) -> None:
    ended = peftflow("status", "--home", tmp_path / "home")
    assert ended.code == 0
    assert "down" in ended.out


def test_doctor_finds_a_home_that_cannot_be_written(tmp_path: Path, peftflow: Any) -> None:
    sound = peftflow("doctor", "--home", tmp_path / "home")
    assert sound.code == 0, sound.out
    broken = peftflow("doctor", "--home", "/proc/peftflow")
    assert broken.code == 1
    assert "broken" in broken.out
    assert "/proc/peftflow" in broken.out


def test_the_shipped_schema_is_the_one_that_is_printed(peftflow: Any) -> None:
    ended = peftflow("schema")
    shipped = (ROOT / "schemas" / "recipe.schema.json").read_text()
    assert ended.out == shipped
