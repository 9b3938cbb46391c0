"""A run whose best candidate trains nothing: what is registered answers as it was evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.core.store import read_manifest
from tests.flows.databases import children, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
RETENTION_TEXT = ROOT / "recipes" / "quickstart" / "retention.jsonl"

#: Loads a version where none of this project can be imported, and prints its answers.
STRANGER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tasks", "schemas", "flows"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import mlflow

model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(json.loads(sys.argv[2]))["completion"].tolist()))
"""


@pytest.fixture(scope="module")
def recipe(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY with candidates that train nothing; nothing trained may be selected."""
    if not (Path(tree["base"]["model"]) / "model.safetensors").exists():
        pytest.skip("recipes/quickstart/base is not there")
    changes: dict[str, Any] = {
        # One prompt at a time and a batch of them differ in bfloat16, by a rounding.
        "base": {**tree["base"], "dtype": "float32"},
        "seeds": [0, 1],
        "data": {**tree["data"], "retention": {"path": str(RETENTION_TEXT)}},
        "candidates": [
            {"method": "zero_shot"},
            {"method": "few_shot", "examples": 2},
            *tree["candidates"],
        ],
        "select": {"minimize": "loss", "subject_to": {"trainable_parameters": "<= 0"}},
        "evaluate": {**tree["evaluate"], "max_new_tokens": 16, "generate_rows": 8},
    }
    path = tmp_path_factory.mktemp("prompts") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts-home") / "home"


@pytest.fixture(scope="module")
def record(recipe: Path, home: Path, peftflow: Any) -> dict[str, Any]:
    """The one run, from nothing."""
    ended = peftflow("run", recipe, "--home", home, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = ended.record
    return found


def entry_of(record: dict[str, Any], home: Path, stage: str, label: str = "") -> Path:
    [key] = [
        line["key"] for line in record["stages"] if (line["stage"], line["label"]) == (stage, label)
    ]
    return home / "store" / stage / key


def test_what_trains_nothing_is_compared_and_selected(record: dict[str, Any], home: Path) -> None:
    candidates = {subject["label"]: subject for subject in record["candidates"]}
    assert list(candidates) == ["zero_shot", "few_shot-2", "lora-r4"]
    zero, shown = candidates["zero_shot"]["figures"], candidates["few_shot-2"]["figures"]
    same = ("loss", "perplexity", "exact_match", "shipped_bytes", "forward_flops_per_token")
    assert {name: zero[name] for name in same} == {
        name: record["base"]["figures"][name] for name in same
    }
    assert shown["loss"] < zero["loss"]
    assert not {"train_peak_mib", "step_time_s"} & {*zero, *shown}
    assert record["selected"] == "few_shot-2"
    assert "no weights to merge" in record["why"]
    assert record["aliases"] == ["challenger", "champion"]
    assert not any(line["stage"] == "merge" for line in record["stages"])
    assert read_manifest(entry_of(record, home, "train", "few_shot-2")).format == "prompt"
    page = Path(record["report"]).read_text()
    assert "few_shot-2" in page
    assert "prompts are" in page


def test_every_seed_stands_in_mlflow_with_what_it_learned_and_forgot(
    record: dict[str, Any], home: Path
) -> None:
    """A run for each candidate and seed, and the means over seeds on their parent."""
    parent = record["mlflow_run"]
    runs = {name: run_id for name, run_id, _ in children(home, parent)}
    assert {"lora-r4 seed 0", "lora-r4 seed 1"} <= {*runs}
    means = metrics(home, parent)
    for name in ("loss", "retention_change"):
        own = [metrics(home, runs[f"lora-r4 seed {seed}"])[name] for seed in (0, 1)]
        assert own[0] != own[1]
        assert means[f"lora-r4/{name}"] == pytest.approx(sum(own) / 2)
        assert means[f"lora-r4/{name}_low"] <= min(own)
        assert means[f"lora-r4/{name}_high"] >= max(own)
    [lora] = [one for one in record["candidates"] if one["label"] == "lora-r4"]
    assert lora["figures"]["retention_change"] == pytest.approx(means["lora-r4/retention_change"])
    assert means["few_shot-2/retention_change"] == 0


def test_the_version_gives_the_answers_that_were_evaluated(
    record: dict[str, Any], home: Path
) -> None:
    evaluated = entry_of(record, home, "evaluate", "finished")
    lines = [json.loads(line) for line in (evaluated / "predictions.jsonl").open()]
    rows = (entry_of(record, home, "prepare") / "test_rows.jsonl").open()
    prompts = {row["row"]: row["prompt"] for row in map(json.loads, rows)}
    assert all(len(line["examples"]) == 2 for line in lines)
    asked = [prompts[line["row"]] for line in lines]
    uri = record["registered"]["model_uri"]
    place = {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"}
    # What other tests of this process have told MLflow is not for this one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    reply = subprocess.run(
        [sys.executable, "-c", STRANGER, uri, json.dumps(asked)],
        cwd=home,
        env=own | place,
        capture_output=True,
        text=True,
    )
    assert reply.returncode == 0, reply.stderr
    assert json.loads(reply.stdout.splitlines()[-1]) == [line["got"] for line in lines]


def test_run_again_finds_everything(
    record: dict[str, Any], recipe: Path, home: Path, peftflow: Any
) -> None:
    again = peftflow("run", recipe, "--home", home, "--json")
    assert again.code == 0, again.err
    assert again.record["all_cached"]
    assert again.record["candidates"] == record["candidates"]
