"""The story told with hands that make nothing heavy: order, keys, what depends on what."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.calls import Calls, Made, Step
from flows.home import Home
from flows.plan import Listing, Pending, already_done, planned
from flows.story import Outcome, story
from schemas.errors import UserError
from schemas.load import load_recipe
from schemas.report import CriteriaReport, GateVerdict, Registration
from tasks.core.store import Store, key_of

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "task": "causal-lm",
    "base": {"model": "base", "dtype": "float32"},
    "data": {"train": {"path": "train.jsonl"}, "test": {"holdout": 0.2}},
    "candidates": [{"method": "full"}, {"method": "lora", "rank": 2}],
    "select": {"minimize": "loss", "subject_to": {"adapter_mib": "<= 1"}},
    "register": {"name": "tiny", "gate": {"loss": "<= 2"}, "promote": True},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with rows and what looks like a base."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def calls(place: Path, home: Home | None = None, **changes: Any) -> Calls:
    """The calls of RECIPE with whole sections replaced."""
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    home = home or Home(place / "home")
    home.open()
    return Calls(load_recipe(path), path, home)


def report(loss: float, mib: float) -> CriteriaReport:
    """A report whose loss and size are given."""
    return CriteriaReport.model_validate(
        {
            "subject": "candidate",
            "method": "lora",
            "storage": {
                "shipped_bytes": int(mib * 2**20),
                "trainable_parameters": 1,
                "trainable_share": 0.1,
            },
            "memory": {
                "train_peak_mib": 1.0,
                "generate_peak_mib": 1.0,
                "base_generate_peak_mib": 1.0,
            },
            "computation": {
                "forward_flops_per_token": 1.0,
                "backward_flops_per_token": 1.0,
                "step_time_s": 1.0,
                "train_tokens_per_s": 1.0,
                "flops_ratio_to_full": 1.0,
                "step_time_ratio_to_full": 1.0,
            },
            "accuracy": {
                "metrics": {"loss": {"value": loss, "low": loss, "high": loss}},
                "rows": 1,
                "retention_loss": None,
                "retention_loss_base": None,
                "retention_change": None,
            },
            "inference_overhead": [],
            "examples": [],
            "device": "cpu",
            "dtype": "float32",
            "how": {},
        }
    )


@dataclass
class Making:
    """Hands that put a small entry into the store at once."""

    home: Home
    losses: dict[str, float] = field(default_factory=dict)
    made: list[Step] = field(default_factory=list)
    asked: list[GateVerdict] = field(default_factory=list)

    def make(self, step: Step) -> Made:
        self.made.append(step)
        return Store(self.home.store).make(step.call, lambda out: self._fill(step, out))

    def _fill(self, step: Step, out: Path) -> dict[str, Any]:
        if step.call.stage == "evaluate":
            mib = 9.0 if step.label == "full" else 0.5
            found = report(self.losses.get(step.label, 1.0), mib)
            (out / "criteria.json").write_text(found.model_dump_json())
        if step.call.stage == "register":
            version = Registration(
                name="tiny",
                version="1",
                run_id="r",
                model_uri="models:/tiny/1",
                max_logit_difference=0.0,
                tolerance=0.0,
            )
            (out / "registration.json").write_text(version.model_dump_json())
        return {}

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        self.asked.append(verdict)
        return verdict.passed


def told(calls: Calls, **losses: float) -> tuple[Outcome, Making]:
    hands = Making(calls.home, losses)
    return story(calls, hands), hands


def keys(calls: Calls) -> dict[str, str]:
    """Title: key of every step of the story."""
    _, hands = told(calls)
    return {step.title: key_of(step.call) for step in hands.made}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {title for title in before if before[title] != after.get(title)}


def test_the_order_and_what_each_step_reads(place: Path) -> None:
    outcome, hands = told(calls(place))
    assert [step.title for step in hands.made] == [
        "inspect",
        "prepare",
        "train full",
        "train lora-r2",
        "evaluate base",
        "evaluate full",
        "evaluate lora-r2",
        "merge lora-r2",
        "evaluate finished",
        "report",
        "register",
    ]
    by_title = {step.title: step.call for step in hands.made}
    assert by_title["register"].inputs["evaluated"] == key_of(by_title["evaluate finished"])
    assert by_title["register"].paths["page"].endswith(key_of(by_title["report"]))
    assert "page" not in by_title["register"].inputs
    assert by_title["evaluate finished"].inputs["subject"] == key_of(by_title["merge lora-r2"])
    assert "subject" not in by_title["evaluate base"].inputs
    assert outcome.choice.label == "lora-r2"  # the better one is too large
    assert outcome.promoted


def test_the_gate_reads_the_finished_model_and_not_the_candidate(place: Path) -> None:
    _, hands = told(calls(place), **{"lora-r2": 1.0, "finished": 3.0})
    assert [verdict.passed for verdict in hands.asked] == [False]


def test_full_tuning_and_unmerged_adapters_are_finished_as_they_are(place: Path) -> None:
    full = calls(place, select={"minimize": "loss", "subject_to": {"adapter_mib": ">= 5"}})
    unmerged = calls(place, finish={"merge": False})
    for each, trained in ((full, "train full"), (unmerged, "train lora-r2")):
        _, hands = told(each)
        by_title = {step.title: step.call for step in hands.made}
        assert not any(title.startswith("merge") for title in by_title)
        assert by_title["register"].inputs["finished"] == key_of(by_title[trained])


def test_a_learning_rate_changes_training_and_what_follows(place: Path) -> None:
    before = keys(calls(place))
    after = keys(calls(place, train={"learning_rate": 1e-2}))
    assert set(before) - changed(before, after) == {"inspect", "prepare", "evaluate base"}


def test_one_candidates_setting_leaves_the_other_candidate_alone(place: Path) -> None:
    slower = [{"method": "full"}, {"method": "lora", "rank": 2, "train": {"learning_rate": 1e-3}}]
    before, after = keys(calls(place)), keys(calls(place, candidates=slower))
    assert not {"train full", "evaluate full", "evaluate base"} & changed(before, after)
    assert {"train lora-r2", "evaluate lora-r2", "register"} <= changed(before, after)


def test_how_one_measures_changes_no_training(place: Path) -> None:
    before, after = keys(calls(place)), keys(calls(place, evaluate={"bootstrap": 200}))
    assert not any(
        title.startswith(("prepare", "train", "merge")) for title in changed(before, after)
    )


def test_a_candidates_name_trains_nothing_again(place: Path) -> None:
    named = [{"method": "full"}, {"method": "lora", "rank": 2, "name": "small"}]
    before, after = keys(calls(place)), keys(calls(place, candidates=named))
    assert before["train lora-r2"] == after["train small"]
    assert before["evaluate lora-r2"] == after["evaluate small"]


def test_where_things_lie_changes_nothing_and_their_content_does(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = keys(calls(place))
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    place.rename(moved)
    elsewhere = keys(calls(moved, Home(moved / "another")))
    assert changed(before, elsewhere) == {"register"}  # another home has another registry
    with (moved / "train.jsonl").open("a") as file:
        file.write('{"prompt": "c", "completion": "d"}\n')
    assert set(before) - changed(before, keys(calls(moved))) == {"inspect"}


def test_a_registry_that_was_deleted_is_filled_again(place: Path) -> None:
    before = keys(calls(place))
    shutil.rmtree(place / "home" / "mlflow")
    assert changed(before, keys(calls(place))) == {"register"}


def test_a_model_card_beside_the_weights_changes_nothing(place: Path) -> None:
    before = keys(calls(place))
    (place / "base" / "README.md").write_text("a card")
    assert keys(calls(place)) == before


def test_a_plan_names_what_a_run_makes_and_makes_nothing(place: Path) -> None:
    first = calls(place)
    steps, later = planned(first)
    assert not any(found.cached for found in steps)
    assert later == ["merge", "evaluate finished", "report", "register"]
    assert not any(first.home.store.iterdir())
    _, hands = told(first)
    assert [found.key for found in steps] == [key_of(step.call) for step in hands.made[:7]]
    steps, later = planned(calls(place))
    assert all(found.cached for found in steps)
    assert (len(steps), later) == (11, [])
    changes = calls(place, train={"learning_rate": 1e-2})
    cached = {found.step.title for found in planned(changes)[0] if found.cached}
    assert cached == {"inspect", "prepare", "evaluate base"}


def test_done_means_every_entry_and_the_promotion(place: Path) -> None:
    assert already_done(calls(place), lambda version: True) is None
    told(calls(place))
    assert already_done(calls(place), lambda version: False) is None
    done = already_done(calls(place), lambda version: True)
    assert done is not None
    assert done[0].promoted
    assert len(done[1]) == 11


def test_a_damaged_entry_is_not_done(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, hands = told(calls(place))
    evaluated = hands.make(next(step for step in hands.made if step.title == "evaluate full"))
    (evaluated.path / "criteria.json").write_text(json.dumps({}))
    assert already_done(calls(place), lambda version: True) is None
    assert "damaged" in capsys.readouterr().err


def test_pending_entries_have_the_paths_that_they_will_have(place: Path) -> None:
    first = calls(place)
    pending = Listing(first.home).make(first.prepare())
    assert isinstance(pending, Pending)
    assert Store(first.home.store).make(first.prepare().call, lambda out: {}).path == pending.path


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda base: (base / "config.json").unlink(), "no config.json"),
        (
            lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
            "pickled checkpoint",
        ),
        (lambda base: (base / "model.safetensors").unlink(), "no \\*.safetensors"),
    ],
)
def test_a_directory_that_is_no_base_is_refused_before_torch(
    place: Path, spoil: Any, words: str
) -> None:
    spoil(place / "base")
    with pytest.raises(UserError, match=words):
        calls(place)


def test_hub_rows_without_a_commit_are_refused(place: Path) -> None:
    with pytest.raises(UserError, match="no `revision`"):
        calls(place, data={"train": {"path": "hub:org/rows"}, "test": {"holdout": 0.2}})


def test_a_hub_base_without_a_network_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf download org/name --revision") as caught:
        calls(place, base={"model": "org/name", "revision": "0" * 40})
    assert "base.model" in caught.value.problems[0].place


def test_what_cannot_be_merged_is_registered_beside_its_base_and_said(place: Path) -> None:
    candidates = [{"method": "bottleneck"}, {"method": "lora", "rank": 2}]
    label = "bottleneck-sequential-16"
    outcome, hands = told(calls(place, candidates=candidates), **{label: 0.5})
    assert outcome.choice.label == label
    assert "bottleneck cannot be merged and is served beside its base" in outcome.choice.why
    assert not any(step.call.stage == "merge" for step in hands.made)
    [registered] = [step for step in hands.made if step.call.stage == "register"]
    [trained] = [step for step in hands.made if step.title == f"train {label}"]
    assert registered.call.inputs["finished"] == key_of(trained.call)


def test_how_often_a_checkpoint_is_written_changes_no_key_but_the_pages(place: Path) -> None:
    """The page shows the recipe as it is."""
    often, seldom = (keys(calls(place, train={"checkpoint_every_s": s})) for s in (1, 100))
    assert {title for title in often if often[title] != seldom[title]} == {"report"}
    longer = keys(calls(place, train={"checkpoint_every_s": 1, "max_steps": 9}))
    assert longer["train full"] != often["train full"]


def test_a_prompt_is_trained_by_what_it_reads_alone(place: Path) -> None:
    """Not by the schedule, but by how many examples, how they are chosen, and the seed."""

    def key(train: dict[str, Any] | None = None, **candidate: Any) -> str:
        asked = [{"method": "few_shot", "name": "shown", **candidate}]
        changes = {"candidates": asked, "select": {"minimize": "loss"}, "train": train or {}}
        return keys(calls(place, **changes))["train shown"]

    first = key()
    assert key({"learning_rate": 1e-2, "max_steps": 9}) == first
    others = [key(examples=3), key(choose="seed"), key({"seed": 1}, choose="seed")]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("method", ["zero_shot", "few_shot"])
def test_a_selected_prompt_is_registered_as_it_is_and_said(place: Path, method: str) -> None:
    candidates = [{"method": method, "name": "asked"}, {"method": "lora", "rank": 2}]
    outcome, hands = told(calls(place, candidates=candidates), asked=0.5)
    assert outcome.choice.label == "asked"
    assert f"{method} has no weights to merge and is served as its base" in outcome.choice.why
    assert not any(step.call.stage == "merge" for step in hands.made)
    by_title = {step.title: step.call for step in hands.made}
    assert by_title["train asked"].format == "prompt"
    assert by_title["register"].inputs["finished"] == key_of(by_title["train asked"])
