"""The whole pipeline through the command line, once, and what must be true afterwards.

Also here, since it needs a run that is done: the servers, and the weekly deployment by a worker.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.home import Home
from flows.records import records
from flows.servers import answers, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end-to-end") / "home"


@pytest.fixture(scope="module")
def ended(tiny: Path, home: Path, peftflow: Any) -> Any:
    """The first run of the recipe, from nothing."""
    ended = peftflow("run", tiny, "--home", home, "--json")
    assert ended.code == 0, ended.err
    return ended


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


@pytest.fixture(scope="module")
def served(ended: Any, home: Path, peftflow: Any) -> Iterator[Home]:
    """The home of a run that is done, with its servers up."""
    try:
        up = peftflow("up", "--home", home)
        assert up.code == 0, up.err + up.out
        yield Home(home)
    finally:
        peftflow("down", "--home", home)


def prefect(served: Home, *arguments: str) -> str:
    """The `prefect` command line against the home's server."""
    server = running(served, "prefect")
    assert server is not None
    environment = served.environment() | {"PREFECT_API_URL": server.api}
    command = [str(Path(sys.executable).with_name("prefect")), "--no-prompt", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def api(served: Home, path: str, body: dict[str, Any]) -> Any:
    server = running(served, "prefect")
    assert server is not None
    request = urllib.request.Request(
        f"{server.api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request))


def test_up_twice_is_up_once(served: Home, peftflow: Any) -> None:
    before = {name: running(served, name) for name in ("prefect", "mlflow")}
    assert peftflow("up", "--home", served.root).code == 0
    assert {name: running(served, name) for name in before} == before
    for name, path in (("prefect", "/api/health"), ("mlflow", "/health")):
        server = before[name]
        assert server is not None
        assert server.url.startswith("http://127.0.0.1:")
        assert answers(server.url + path)
        assert server.url in peftflow("status", "--home", served.root).out


def test_a_worker_runs_the_weekly_deployment(served: Home, tiny: Path, ended: Any) -> None:
    prefect(served, "deploy", "--prefect-file", "infra/prefect.yaml", "--all")
    [deployment] = api(served, "/deployments/filter", {})
    assert deployment["name"] == "weekly"
    assert deployment["schedules"][0]["schedule"]["cron"] == "0 5 * * 1"
    prefect(served, "deployment", "run", "peftflow/weekly", "--param", f"recipe={tiny}")
    prefect(served, "worker", "start", "--pool", "peftflow", "--type", "process", "--run-once")
    by_worker = {"deployments": {"id": {"any_": [deployment["id"]]}}}
    [run] = [run for run in api(served, "/flow_runs/filter", by_worker) if run["start_time"]]
    assert (run["name"], run["state_type"]) == ("tiny", "COMPLETED")
    tasks = api(served, "/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert {(task["state_type"], task["state_name"]) for task in tasks} == {("COMPLETED", "Cached")}
    assert len(tasks) == len(ended.record["stages"])
    states = {record.prefect_flow_run: record.state for record in records(served)}
    assert states[run["id"]] == "done"


def test_down_stops_both_and_leaves_no_process(
    served: Home, peftflow: Any, processes_naming: Any
) -> None:
    servers = [running(served, name) for name in ("prefect", "mlflow")]
    assert all(servers)
    assert peftflow("down", "--home", served.root).code == 0
    assert running(served, "prefect") is None
    assert running(served, "mlflow") is None
    for server in servers:
        assert server is not None
        assert not answers(f"{server.url}/health")
        assert not processes_naming(f"--port {server.url.rsplit(':', 1)[1]}")
    assert "nothing was up" in peftflow("down", "--home", served.root).out
