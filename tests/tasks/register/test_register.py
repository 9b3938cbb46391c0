"""Registering on a real SQLite MLflow: what is loaded back is what was finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.models import Model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.errors import StageError, UserError
from schemas.report import Registration
from tasks.core.store import read_manifest
from tasks.register import registry
from tasks.register.promote import champion, promote
from tasks.register.served_model import find_base
from tasks.register.verify import Reloaded

ROOT = Path(__file__).parents[3]

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
rows, params = json.loads(sys.argv[2]), json.loads(sys.argv[3])
print(json.dumps(model.predict(rows, params=params).to_dict("list")))
"""


def ask_stranger(
    world: Any, uri: str, rows: list[str], params: Any = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STRANGER, uri, json.dumps(rows), json.dumps(params)],
        cwd=world.home,
        env={**os.environ, "MLFLOW_TRACKING_URI": world.tracking},
        capture_output=True,
        text=True,
    )


def artifacts_of(world: Any) -> Path:
    """The directory of the one model that MLflow stores."""
    [found] = (world.home / "mlflow" / "artifacts").glob("*/models/*/artifacts")
    return found


def test_a_merged_model_answers_without_the_project(registered: Any) -> None:
    [entry] = (registered.home / "store" / "register").glob("[!.]*")
    registration = Registration.model_validate_json((entry / "registration.json").read_bytes())
    assert registration.max_logit_difference == 0.0
    assert read_manifest(entry).facts["prompts_asked_alike"] == "3/3"
    reply = ask_stranger(registered, registration.model_uri, ["where is it?", "a red one"])
    assert reply.returncode == 0, reply.stderr
    got = json.loads(reply.stdout.splitlines()[-1])["completion"]
    assert got == [greedy(registered, "where is it?"), greedy(registered, "a red one")]


def test_the_version_is_the_challenger(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered.tracking)
    [record] = registry.versions(registered.home, "answers")
    assert record.aliases == ["challenger"]
    assert record.verified
    assert record.figures["accuracy"] == 0.93


def greedy(world: Any, prompt: str) -> str:
    """A slow reference: one token at a time, without a cache."""
    directory = world.paths["finished"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written: list[int] = []
    while len(written) < world.spec.max_new_tokens:
        with torch.no_grad():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def test_a_version_carries_its_whole_story(registered: Any) -> None:
    stored = artifacts_of(registered)
    package = stored / "artifacts" / "package"
    requirements = (stored / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    assert not any(line.startswith(("peft", "prefect", "polars")) for line in requirements)
    manifest = json.loads((package / "manifest.json").read_text())
    assert manifest.keys() == {"prepared", "finished", "evaluated", "trained"}
    assert manifest["prepared"]["outside"] == {"train": "0" * 64}
    for record in manifest.values():
        assert {"git_commit", "git_dirty", "libraries"} <= record["provenance"].keys()
    card = (package / "README.md").read_text()
    for part in ("quickstart/base", "0" * 64, "Five criteria", "Limits", "@champion"):
        assert part in card
    assert str(registered.home) not in card
    assert json.loads((package / "serving.json").read_text())["template"] == "chat"
    assert (package / "report.html").read_text() == "<html>"
    assert not list(stored.rglob("*.pkl"))
    assert json.loads((stored / "input_example.json").read_text())


def test_the_signature_is_text_in_and_text_out(registered: Any) -> None:
    """What MLflow holds a question against before the model sees it."""
    stored = Model.load(artifacts_of(registered) / "MLmodel").signature
    assert [(column.type.name, column.name) for column in stored.inputs] == [("string", None)]
    outputs = [(column.type.name, column.name) for column in stored.outputs]
    assert outputs == [("string", "completion")]
    [param] = stored.params
    assert (param.name, param.dtype.name, param.default) == ("max_new_tokens", "long", 12)


def test_a_classifiers_signature_gives_label_and_score() -> None:
    made = registry.signature("sequence-classification", 1)
    outputs = [(column.type.name, column.name) for column in made.outputs]
    assert outputs == [("string", "label"), ("double", "score")]
    assert made.params is None


def test_an_adapter_needs_exactly_its_base(
    classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A directory named `tasks` where the user stands is not taken for ours.
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    entry = classifier.register()
    assert entry.facts["max_logit_difference"] == 0.0
    assert entry.facts["prompts_asked_alike"] == "3/3"
    package = artifacts_of(classifier) / "artifacts" / "package"
    assert not (package / "model" / "model.safetensors").exists()
    serving = json.loads((package / "serving.json").read_text())
    assert find_base(serving["base"]) == classifier.paths["base"].resolve()

    other = shutil.copytree(classifier.paths["base"], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = "embeddings.LayerNorm.bias"
    weights[name] = weights[name] + 1e-6
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTFLOW_BASE", str(other))
        with pytest.raises(RuntimeError, match=r"model\.safetensors is not the file"):
            find_base(serving["base"])
    with pytest.raises(RuntimeError, match="set PEFTFLOW_BASE"):
        find_base({**serving["base"], "path": str(tmp_path / "gone")})

    reply = ask_stranger(classifier, "models:/intents@challenger", ["my card is gone", "top up"])
    assert reply.returncode == 0, reply.stderr
    got = json.loads(reply.stdout.splitlines()[-1])
    assert set(got["label"]) <= {"card_lost", "top_up", "refund"}
    assert all(1 / 3 <= score <= 1 for score in got["score"])


def test_a_version_that_loads_differently_fails_and_cannot_be_promoted(causal: Any) -> None:
    """What MLflow stores is changed between logging and loading back."""
    made: list[registry.VersionRecord] = []

    def change_what_is_stored(*arguments: Any) -> registry.VersionRecord:
        record = register_package(*arguments)
        path = artifacts_of(causal) / "artifacts" / "package" / "model" / "model.safetensors"
        weights = load_file(path)
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
        save_file(weights, path, {"format": "pt"})
        made.append(record)
        return record

    register_package = registry.register_package
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "register_package", change_what_is_stored)
        with pytest.raises(StageError, match="does not load as it was trained"):
            causal.register()
    [record] = registry.versions(causal.home, "answers")
    assert record.version == made[0].version
    assert not record.verified
    assert record.aliases == []
    with pytest.raises(UserError, match="never shown to load"):
        promote(causal.home, "answers", record.version, "", {})
    assert champion(causal.home, "answers") is None


class Killed(BaseException):
    """Ends a run at a chosen place, past every `except Exception`."""


@pytest.mark.parametrize("place", ["logged_model", "ensure_name", "record_of", "mark_verified"])
def test_a_run_cut_short_goes_on_with_one_version(
    causal: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise Killed

    # Loading back is not what is tested here, and takes most of the time.
    monkeypatch.setattr("tasks.register.stage.reload", lambda *_: Reloaded(0.0, 1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(registry, place, cut)
        with pytest.raises(Killed):
            causal.register()
    causal.register()
    causal.register()
    assert_made_once(causal)


#: A run of the stage that is killed inside MLflow's upload.
KILLED_WHILE_STORING = """
import json, os, signal, sys
from pathlib import Path
from mlflow.tracking.client import MlflowClient
from schemas.stages import RegisterSpec
from tasks.register.stage import run

MlflowClient.log_model_artifacts = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
paths = {name: Path(path) for name, path in json.loads(sys.argv[2]).items()}
run(RegisterSpec.model_validate_json(sys.argv[1]), paths, Path(sys.argv[3]))
"""


def test_a_run_killed_while_storing_goes_on_with_one_version(
    causal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL inside MLflow's upload leaves a LoggedModel PENDING."""
    out = causal.home / "killed"
    out.mkdir()
    paths = json.dumps({name: str(path) for name, path in causal.paths.items()})
    command = [sys.executable, "-c", KILLED_WHILE_STORING]
    command += [causal.spec.model_dump_json(), paths, str(out)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert statuses(causal) == ["PENDING"]
    monkeypatch.setattr("tasks.register.stage.reload", lambda *_: Reloaded(0.0, 1, 1))
    causal.register()
    assert_made_once(causal)


def statuses(world: Any) -> list[str]:
    client = registry.connect(world.tracking)
    experiment = registry.experiment(client, world.spec.recipe_name)
    return [str(model.status) for model in client.search_logged_models([experiment])]


def assert_made_once(world: Any) -> None:
    [record] = registry.versions(world.home, world.spec.name)
    assert record.verified
    assert record.aliases == ["challenger"]
    assert statuses(world) == ["READY"]


def test_unknown_names_come_with_the_nearest(causal: Any, add_version: Any) -> None:
    add_version("banking-intent")
    with pytest.raises(UserError, match="did you mean banking-intent"):
        registry.versions(causal.home, "bankin-intent")
    with pytest.raises(UserError, match="choose one of 1"):
        promote(causal.home, "banking-intent", "7", "", {})
