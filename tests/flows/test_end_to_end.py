"""The whole pipeline through the command line, once, and what must be true afterwards.

Also here, since it needs a run that is done: the servers, and the weekly deployment by a worker.
"""

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
from flows.remember import FileHashes
from flows.servers import answers, running
from tasks.core.bases import base_files
from tasks.register import registry
from tasks.register.promote import ledger
from tests.flows.databases import children, metrics, query

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]

STAGES = [
    ("inspect", ""),
    ("prepare", ""),
    ("cost", ""),
    ("cost", "base x 10"),
    ("evaluate", "base"),
    ("train", "lora-r4"),
    ("evaluate", "lora-r4"),
    ("compare", ""),
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


def flow_runs(home: Path) -> list[Any]:
    sql = "select id, state_type, state_name from flow_run order by start_time"
    return query(home / "prefect" / "prefect.db", sql)


def test_the_record_says_all_that_was_done(ended: Any) -> None:
    record = ended.record
    assert record["state"] == "done"
    assert [(line["stage"], line["label"]) for line in record["stages"]] == STAGES
    assert not any(line["cached"] for line in record["stages"])
    assert all(len(line["key"]) == 40 for line in record["stages"])
    page = Path(record["report"]).read_text()
    assert "<html" in page[:2000].lower()
    # What was predicted of the candidate, from the step that tells costs.
    assert 'id="predicted"' in page
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
    found = children(home, parent)
    assert {(name, status) for name, _, status in found} == {
        (name, "FINISHED") for name in ("base", "lora-r4", "finished")
    }
    by_name = {name: run_id for name, run_id, _ in found}
    figures = ended.record["candidates"][0]["figures"]
    assert figures.items() <= metrics(home, by_name["lora-r4"]).items()
    curve = query(
        database,
        "select step from metrics where key = 'train_loss' "
        f"and run_uuid = '{by_name['lora-r4']}' order by step",
    )
    assert len(curve) == 4
    [(place,)] = query(database, f"select artifact_uri from runs where run_uuid = '{parent}'")
    assert (Path(place.removeprefix("file://")) / "report.html").exists()


def test_the_merged_version_names_its_base_by_content(
    ended: Any, home: Path, tree: Any, tmp_path: Path
) -> None:
    """Whoever has the version alone can tell which weights its adapter was folded into."""
    [package] = home.glob("mlflow/artifacts/tiny/models/*/artifacts/artifacts/package")
    manifests = json.loads((package / "manifest.json").read_text())
    assert manifests["finished"]["stage"] == "merge"
    files = base_files(Path(tree["base"]["model"]))
    assert any(path.suffix == ".safetensors" for path in files)
    now = FileHashes(tmp_path / "hashes.json").of_files(files)  # an empty cache: every byte is read
    assert manifests["finished"]["outside"] == {"base": now}
    assert manifests["trained"]["outside"] == {"base": now}


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


def entries(home: Path) -> set[str]:
    """Every whole entry of the store. What begins with a dot is none."""
    return {f"{path.parent.name}/{path.name}" for path in home.glob("store/*/[!.]*")}


@pytest.mark.parametrize(
    ("change", "code", "state", "place", "words"),
    [
        # Weights of 1e38 give sums beyond what float32 and bfloat16 hold.
        ("train.learning_rate=1e38", 1, "failed", "", "lower train.learning_rate"),
        ("candidates.0.rank=4096", 2, "wrong-input", "candidates[0].rank", "only 256 wide"),
    ],
)
def test_a_stage_that_fails_is_recorded_everywhere_and_leaves_nothing(
    change: str,
    code: int,
    state: str,
    place: str,
    words: str,
    ended: Any,
    tiny: Path,
    home: Path,
    peftflow: Any,
    processes_naming: Any,
) -> None:
    """Exit 1 where a stage fails, 2 where its child process finds the user's input wrong."""
    before = entries(home)
    failed = peftflow("run", tiny, "--home", home, "--json", "--set", change)
    assert failed.code == code, failed.err
    assert failed.record["state"] == state
    record = next(records(Home(home)))
    assert record.state == state
    assert record.ended is not None
    for [error] in (failed.record["errors"], record.errors):
        assert error["place"] == place
        assert words in error["found"]
    assert flow_runs(home)[-1][:2] == (record.prefect_flow_run, "FAILED")
    told = f"select status from runs where run_uuid = '{record.mlflow_run}'"
    assert query(home / "mlflow" / "mlflow.db", told) == [("FAILED",)]
    assert processes_naming(str(home)) == []
    assert entries(home) == before


def test_a_selection_that_no_candidate_meets_is_exit_1(
    ended: Any, tiny: Path, home: Path, peftflow: Any
) -> None:
    """All that it reads is in the store, so it is answered from there, before any flow begins."""
    before = entries(home), flow_runs(home)
    bound = 'select.subject_to={adapter_mib: "< 0"}'
    failed = peftflow("run", tiny, "--home", home, "--json", "--set", bound)
    assert failed.code == 1, failed.err
    assert failed.record["state"] == "failed"
    [error] = failed.record["errors"]
    assert "no candidate keeps the bounds" in error["found"]
    assert "lora-r4: adapter_mib is" in error["found"]
    assert (entries(home), flow_runs(home)) == before


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


def another_version(home: Path, name: str) -> str:
    """Version 1 again under the next number, as if a second week's run had registered it."""
    client = registry.connect(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    first = client.get_model_version(name, "1")
    tags = first.tags | {"peftflow.key": "another"}
    made = client.create_model_version(name, first.source, first.run_id, tags=tags)
    return str(made.version)


def test_another_version_is_promoted_compared_and_rolled_back(
    ended: Any, home: Path, peftflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # MLflow sets it; put back after the test
    other = another_version(home, "tiny")
    promoted = peftflow("promote", "tiny", other, "--why", "better on Monday", "--home", home)
    assert promoted.code == 0, promoted.err
    assert f"tiny version {other} is now the champion" in promoted.out

    compared = peftflow("compare", "tiny", "--home", home)
    assert compared.code == 0, compared.err
    title, heads, *lines = compared.out.splitlines()
    assert title.strip() == "tiny"
    columns = [head.strip() for head in heads.split("  ") if head.strip()]
    assert [head.split()[0] for head in columns] == [str(n) for n in range(int(other), 0, -1)]
    assert columns[0] == f"{other} (champion)"
    assert sum("challenger" in head for head in columns) == 1
    loss = f"{ended.record['finished']['figures']['loss']:,.4g}"
    assert ["loss", *[loss] * len(columns)] in [line.split() for line in lines]

    back = peftflow("rollback", "tiny", "--why", "worse on Tuesday", "--home", home)
    assert back.code == 0, back.err
    assert f"champion went from version {other} to 1" in back.out
    moves = [(entry.from_version, entry.to_version, entry.why) for entry in ledger(home, "tiny")]
    assert moves[-2:] == [("1", other, "better on Monday"), (other, "1", "worse on Tuesday")]
    assert "champion of tiny: version 1" in peftflow("status", "--home", home).out


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
