"""The whole pipeline through the command line, once, and what must be true afterwards."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("end-to-end")]

STAGES = [
    ("inspect", ""),
    ("prepare", ""),
    ("train", "lora-r4"),
    ("evaluate", "base"),
    ("evaluate", "lora-r4"),
    ("merge", "lora-r4"),
    ("evaluate", "finished"),
    ("report", ""),
    ("register", ""),
]


def query(database: Path, sql: str) -> list[Any]:
    with sqlite3.connect(database) as connection:
        return connection.execute(sql).fetchall()


def flow_runs(home: Path) -> list[Any]:
    sql = "select id, state_type, state_name from flow_run order by start_time"
    return query(home / "prefect" / "prefect.db", sql)


def test_the_record_says_all_that_was_done(ended: Any) -> None:
    record = ended.record
    assert record["state"] == "done"
    assert [(line["stage"], line["label"]) for line in record["stages"]] == STAGES
    assert not any(line["cached"] for line in record["stages"])
    assert all(len(line["key"]) == 40 for line in record["stages"])
    assert "<html" in Path(record["report"]).read_text()[:2000].lower()
    criteria = ("storage", "memory", "computation", "accuracy", "inference_overhead")
    for subject in (record["base"], *record["candidates"], record["finished"]):
        assert all(subject[criterion] for criterion in criteria)
    assert record["selected"] == "lora-r4"
    assert record["registered"]["version"] == "1"
    assert record["aliases"] == ["challenger", "champion"]
    assert record["gate"]["passed"]


def test_prefect_knows_every_task_as_completed(ended: Any, home: Path) -> None:
    run_id = ended.record["prefect_flow_run"]
    assert (run_id, "COMPLETED", "Completed") in flow_runs(home)
    sql = f"select name, state_type from task_run where flow_run_id = '{run_id}'"
    tasks = query(home / "prefect" / "prefect.db", sql)
    names = [f"{stage} {label}".strip() for stage, label in STAGES] + ["promote tiny 1"]
    assert sorted(tasks) == sorted((name, "COMPLETED") for name in names)


def test_mlflow_compares_what_was_measured(ended: Any, home: Path) -> None:
    database = home / "mlflow" / "mlflow.db"
    parent = ended.record["mlflow_run"]
    children = query(
        database,
        "select r.name, r.run_uuid, r.status from runs r join tags t on t.run_uuid = r.run_uuid "
        f"where t.key = 'mlflow.parentRunId' and t.value = '{parent}'",
    )
    assert {(name, status) for name, _, status in children} == {
        (name, "FINISHED") for name in ("base", "lora-r4", "finished")
    }
    by_name = {name: run_id for name, run_id, _ in children}
    logged = query(
        database,
        f"select key, value from latest_metrics where run_uuid = '{by_name['lora-r4']}'",
    )
    figures = ended.record["candidates"][0]["figures"]
    assert figures.items() <= dict(logged).items()
    curve = query(
        database,
        "select step from metrics where key = 'train_loss' "
        f"and run_uuid = '{by_name['lora-r4']}' order by step",
    )
    assert len(curve) == 4
    [(place,)] = query(database, f"select artifact_uri from runs where run_uuid = '{parent}'")
    assert (Path(place.removeprefix("file://")) / "report.html").exists()


def test_nothing_is_left_running(ended: Any, home: Path, processes_naming: Any) -> None:
    assert processes_naming(str(home)) == []


def test_run_again_finds_everything_and_imports_nothing_heavy(
    ended: Any, tiny: Path, home: Path, peftflow: Any, heavy_imports: Any
) -> None:
    before = flow_runs(home)
    again = peftflow("run", tiny, "--home", home, "--json", python=("-X", "importtime"))
    assert again.code == 0, again.err
    assert "Everything is already done" in again.err
    assert not heavy_imports(again.err)
    record, first = again.record, ended.record
    assert record["all_cached"]
    assert all(line["cached"] for line in record["stages"])
    same = ("candidates", "finished", "registered", "aliases", "gate", "selected")
    assert {name: record[name] for name in same} == {name: first[name] for name in same}
    assert flow_runs(home) == before


def test_a_refusing_gate_is_exit_3_and_makes_the_page_again_alone(
    ended: Any, tiny: Path, home: Path, peftflow: Any
) -> None:
    refused = peftflow("run", tiny, "--home", home, "--json", "--set", 'register.gate.loss="< 0"')
    assert refused.code == 3, refused.err
    record = refused.record
    assert record["state"] == "refused"
    assert not record["gate"]["passed"]
    # The page shows the recipe, gate and all; nothing else reads the gate.
    assert [line["stage"] for line in record["stages"] if not line["cached"]] == ["report"]
    assert record["registered"] == ended.record["registered"]
    assert flow_runs(home)[-1][1:] == ("FAILED", "GateRefused")


def test_a_damaged_entry_is_found_said_and_made_again(
    ended: Any, tiny: Path, home: Path, peftflow: Any
) -> None:
    key = next(line["key"] for line in ended.record["stages"] if line["stage"] == "report")
    page = home / "store" / "report" / key / "report.html"
    whole = page.read_bytes()
    page.write_bytes(whole[:-1] + b"!")
    again = peftflow("run", tiny, "--home", home, "--json")
    assert again.code == 0, again.err
    assert "report.html" in again.err
    assert "damaged" in again.err
    made = [line["stage"] for line in again.record["stages"] if not line["cached"]]
    assert made == ["report"]
    assert page.read_bytes() == whole


def test_what_was_run_can_be_looked_at(ended: Any, tiny: Path, home: Path, peftflow: Any) -> None:
    for command in (["status"], ["report", ended.record["run_id"]], ["compare", "tiny"]):
        shown = peftflow(*command, "--home", home)
        assert shown.code == 0, shown.err
        assert "tiny" in shown.out
    plan = peftflow("plan", tiny, "--home", home)
    assert plan.out.count("cached") == len(STAGES)
    assert "to make" not in plan.out


def test_promotion_and_rollback_by_hand(ended: Any, home: Path, peftflow: Any) -> None:
    again = peftflow("promote", "tiny", "1", "--home", home)
    assert again.code == 0
    assert "already" in again.out
    assert peftflow("promote", "tiny", "7", "--home", home).code == 2
    assert peftflow("rollback", "tiny", "--home", home).code == 2  # there was none before it
    assert peftflow("compare", "tiney", "--home", home).code == 2
