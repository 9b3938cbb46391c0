"""`peftflow up`, the weekly deployment, one run of it by a process worker, `peftflow down`."""

from __future__ import annotations

import json
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("end-to-end")]

ROOT = Path(__file__).resolve().parents[2]


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
