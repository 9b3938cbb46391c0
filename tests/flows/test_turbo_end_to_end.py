"""A run with Turbo heads, from rows to a version that answers with them where nobody knows us."""

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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Loads a version where none of this project can be imported, and prints its answers with heads
#: and without, and whether it wrote with them.
STRANGER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tasks", "schemas", "flows"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import mlflow

model = mlflow.pyfunc.load_model(sys.argv[1])
asked = json.loads(sys.argv[2])
writer = model.unwrap_python_model().writer
written = []
write = writer.write
writer.write = lambda *a, **k: written.append(1) or write(*a, **k)
answers = {}
for turbo in (None, True, False):
    params = {} if turbo is None else {"turbo": turbo}
    answers[str(turbo)] = model.predict(asked, params)["completion"].tolist(), len(written)
    written.clear()
params = [one.name for one in model.metadata.signature.params.params]
print(json.dumps({"answers": answers, "heads": writer.drafter is not None, "params": params}))
"""


@pytest.fixture(scope="module")
def recipe(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY's candidate with heads of its own, beside its base; answers long enough for drafts."""
    if not (Path(tree["base"]["model"]) / "model.safetensors").exists():
        pytest.skip("recipes/quickstart/base is not there")
    turbo = {"heads": 3, "prompts": 60, "epochs": 4, "batch_tokens": 256, "learning_rate": 1e-2}
    [lora] = tree["candidates"]
    changes: dict[str, Any] = {
        # Batches of several sizes differ in bfloat16, by a rounding.
        "base": {**tree["base"], "dtype": "float32"},
        "candidates": [{**lora, "method": "turbo_lora", "turbo": turbo}],
        "train": {**tree["train"], "max_steps": 30},
        "evaluate": {
            **tree["evaluate"],
            "max_new_tokens": 24,
            "generate_rows": 8,
            "batch_sizes": [1, 3],
        },
        "finish": {"merge": False},
    }
    path = tmp_path_factory.mktemp("turbo") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("turbo-home") / "home"


@pytest.fixture(scope="module")
def record(recipe: Path, home: Path, peftflow: Any) -> dict[str, Any]:
    """The one run, from nothing."""
    ended = peftflow("run", recipe, "--home", home, "--json")
    assert ended.code == 0, ended.err
    assert "answers with heads differ" not in ended.err
    assert "Converting a tensor" not in ended.err
    found: dict[str, Any] = ended.record
    return found


def entry_of(record: dict[str, Any], home: Path, stage: str, label: str = "") -> Path:
    [key] = [
        line["key"] for line in record["stages"] if (line["stage"], line["label"]) == (stage, label)
    ]
    return home / "store" / stage / key


def test_heads_are_made_measured_and_shown(record: dict[str, Any], home: Path) -> None:
    made = [f"{line['stage']} {line['label']}".strip() for line in record["stages"]]
    assert made[-5:] == [
        "compare",
        "turbo turbo_lora-r4",
        "evaluate finished",
        "report",
        "register",
    ]
    facts = read_manifest(entry_of(record, home, "turbo", "turbo_lora-r4")).facts
    criteria = json.loads(
        (entry_of(record, home, "evaluate", "finished") / "criteria.json").read_text()
    )
    told = criteria["speculation"]
    assert told["parameters"] == facts["parameters"] <= facts["medusa_parameters"] / 20
    assert told["stored_bytes"] == facts["stored_bytes"]
    assert [speed["batch_size"] for speed in told["speeds"]] == [1, 3]
    # In float32 every answer is generate()'s.
    assert told["alike"] == told["rows"] > 0
    figures = record["finished"]["figures"]
    assert figures["turbo_parameters"] == facts["parameters"]
    assert {"speedup_b1", "speculation_b3", "tokens_per_pass_b1"} <= figures.keys()
    assert "turbo_parameters" not in record["candidates"][0]["figures"]
    assert 'id="turbo"' in Path(record["report"]).read_text()


def test_the_version_carries_heads_and_their_code_and_loads_as_it_was_trained(
    record: dict[str, Any], home: Path
) -> None:
    [package] = home.glob("mlflow/artifacts/tiny/models/*/artifacts/artifacts/package")
    heads = entry_of(record, home, "turbo", "turbo_lora-r4") / "heads"
    for path in heads.iterdir():
        assert (package / "heads" / path.name).read_bytes() == path.read_bytes()
    assert (package / "speculate" / "decode.py").exists()
    assert (package / "turbo.py").exists()
    assert "heads" in json.loads((package / "manifest.json").read_text())
    registration = entry_of(record, home, "register") / "registration.json"
    assert json.loads(registration.read_text())["max_logit_difference"] == 0


def test_a_stranger_gets_the_same_answers_with_heads_and_without(
    record: dict[str, Any], home: Path
) -> None:
    """The answers that were evaluated, from a process in which this project cannot be imported."""
    evaluated = entry_of(record, home, "evaluate", "finished")
    lines = [json.loads(line) for line in (evaluated / "predictions.jsonl").open()]
    rows = (entry_of(record, home, "prepare") / "test_rows.jsonl").open()
    prompts = {row["row"]: row["prompt"] for row in map(json.loads, rows)}
    asked = [prompts[line["row"]] for line in lines]
    # What other tests of this process have told MLflow is not for this one.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    place = {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"}
    reply = subprocess.run(
        [sys.executable, "-c", STRANGER, record["registered"]["model_uri"], json.dumps(asked)],
        cwd=home,
        env=own | place,
        capture_output=True,
        text=True,
    )
    assert reply.returncode == 0, reply.stderr
    told = json.loads(reply.stdout.splitlines()[-1])
    assert told["heads"]
    assert told["params"] == ["max_new_tokens", "turbo"]
    answers = [line["got"] for line in lines]
    (by_default, wrote), (with_heads, wrote_too), (without, not_with) = told["answers"].values()
    assert by_default == with_heads == without == answers
    assert wrote == wrote_too > 0
    assert not_with == 0


def test_generate_streams_the_answer_and_says_how_fast_it_came(
    record: dict[str, Any], home: Path, peftflow: Any
) -> None:
    evaluated = entry_of(record, home, "evaluate", "finished")
    line = json.loads((evaluated / "predictions.jsonl").open().readline())
    rows = (entry_of(record, home, "prepare") / "test_rows.jsonl").open()
    [prompt] = [row["prompt"] for row in map(json.loads, rows) if row["row"] == line["row"]]
    asked = ("generate", "tiny/1", "--prompt", prompt, "--home", home)
    ended = peftflow(*asked)
    assert ended.code == 0, ended.err
    # Standard output is the answer alone.
    assert ended.out == line["got"] + "\n"
    assert "tokens a pass of the model" in ended.err
    assert "the same text" in ended.err
    without = peftflow(*asked, "--no-turbo", "--max-new-tokens", "3")
    assert without.out.strip()
    assert line["got"].startswith(without.out.rstrip("\n"))
    assert "without Turbo heads (left out)" in without.err
    drawn = [peftflow(*asked, "--temperature", "1.5", "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    unknown = peftflow("generate", "tiny@nobody", "--prompt", prompt, "--home", home)
    assert unknown.code == 2
    assert "no version has the alias nobody" in unknown.err


def test_run_again_finds_everything(
    record: dict[str, Any], recipe: Path, home: Path, peftflow: Any
) -> None:
    again = peftflow("run", recipe, "--home", home, "--json")
    assert again.code == 0, again.err
    assert again.record["all_cached"]
    assert again.record["finished"] == record["finished"]
