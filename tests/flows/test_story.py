"""The story told with hands that make nothing heavy: order, keys, what depends on what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flows.calls import Made, Step
from flows.home import Home
from flows.plan import Listing, Pending, already_done, planned
from flows.story import story
from schemas.errors import DivergedError, StageError, UserError
from tasks.core.store import Store, key_of
from tests.flows.hands import RECIPE, Making, calls, changed, keys, told


def test_the_order_and_what_each_step_reads(place: Path) -> None:
    outcome, hands = told(calls(place))
    assert [step.title for step in hands.made] == [
        "inspect",
        "prepare",
        "cost",
        "cost base x 10",
        "evaluate base",
        "train full",
        "train lora-r2",
        "evaluate full",
        "evaluate lora-r2",
        "compare",
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


def test_rows_without_the_metric_are_told_before_anything_is_trained(place: Path) -> None:
    """No expected answer of the tiny rows is a JSON object, which field_f1 reads."""
    each = calls(place, select={"maximize": "field_f1"})
    hands = Making(each.home)
    with pytest.raises(UserError, match=r"field_f1 is not measured on the test rows.*JSON"):
        story(each, hands)
    assert not [step for step in hands.made if step.call.stage == "train"]


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
    # A rate costs nothing.
    same = {"inspect", "prepare", "cost", "cost base x 10", "evaluate base"}
    assert set(before) - changed(before, after) == same


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
    assert list(later) == ["merge", "evaluate finished", "report", "register"]
    assert not any(first.home.store.iterdir())
    _, hands = told(first)
    assert [found.key for found in steps] == [key_of(step.call) for step in hands.made[:10]]
    steps, later = planned(calls(place))
    assert all(found.cached for found in steps)
    assert (len(steps), later) == (14, {})
    changes = calls(place, train={"learning_rate": 1e-2})
    cached = {found.step.title for found in planned(changes)[0] if found.cached}
    assert cached == {"inspect", "prepare", "cost", "cost base x 10", "evaluate base"}


def test_done_means_every_entry_and_the_promotion(place: Path) -> None:
    assert already_done(calls(place), lambda version: True) is None
    told(calls(place))
    assert already_done(calls(place), lambda version: False) is None
    done = already_done(calls(place), lambda version: True)
    assert done is not None
    assert done[0].promoted
    assert len(done[1]) == 14


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


def test_what_cannot_be_merged_is_registered_beside_its_base_and_said(place: Path) -> None:
    candidates = [{"method": "bottleneck"}, {"method": "lora", "rank": 2}]
    label = "bottleneck-sequential-16"
    outcome, hands = told(calls(place, candidates=candidates), **{label: 0.5})
    assert outcome.choice.label == label
    assert "bottleneck is not merged and is served beside its base" in outcome.choice.why
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


THREE = {"seeds": [3, 5, 8], "select": {"minimize": "loss"}}


def test_each_seed_is_trained_and_the_first_ones_model_goes_on(place: Path) -> None:
    """The others are scored and nothing else: what they cost is measured once."""
    outcome, hands = told(calls(place, **THREE), full=2.0)
    titles = [step.title for step in hands.made]
    for label in ("full", "lora-r2"):
        assert [title for title in titles if title.startswith(f"train {label}")] == [
            f"train {label} seed {seed}" for seed in (3, 5, 8)
        ]
        assert titles.count(f"evaluate {label}") == 1
    scored = [step for step in hands.made if step.call.spec.get("accuracy_only")]
    assert {step.seed for step in scored} == {5, 8}
    seeds = {
        step.seed: step.call.spec["train"]["seed"]
        for step in hands.made
        if step.call.stage == "train"
    }
    assert seeds == {3: 3, 5: 5, 8: 8}
    [merged] = [step for step in hands.made if step.call.stage == "merge"]
    [first] = [step for step in hands.made if step.title == "train lora-r2 seed 3"]
    assert merged.call.inputs["trained"] == key_of(first.call)
    # Seeds 5 and 8 are worse by 5 and 8: the figure is the mean, and the gate's is not.
    assert outcome.reports["lora-r2"].figures()["loss"] == pytest.approx(1 + 13 / 3)
    assert outcome.reports["finished"].figures()["loss"] == 1.0


def test_one_seed_is_the_same_training_however_it_is_written(place: Path) -> None:
    written = keys(calls(place, seeds=[4]))
    assert written["train full"] == keys(calls(place, train={"seed": 4}))["train full"]


def test_a_search_gives_each_candidate_as_many_trials_and_takes_the_best_rate(place: Path) -> None:
    rates = [0.001, 0.009, 0.1]
    own = {"method": "ia3", "train": {"learning_rate": 0.5}}
    recipe = {
        "search": {"learning_rate": rates, "trials": 3, "share": 0.5},
        "train": {"epochs": 4},
        "candidates": [*RECIPE["candidates"], own],
    }
    hands = Making(calls(place).home, diverging=0.05)
    outcome = story(calls(place, **recipe), hands)
    trials = [step for step in hands.made if step.trial and step.call.stage == "train"]
    assert sorted((step.label, step.trial) for step in trials) == sorted(
        (label, rate) for label in ("full", "lora-r2") for rate in rates
    )
    assert {step.call.spec["train"]["epochs"] for step in trials} == {2}
    trained = {
        step.label: step.call.spec["train"]["learning_rate"]
        for step in hands.made
        if step.call.stage == "train" and step.trial is None
    }
    assert trained == {"full": 0.009, "lora-r2": 0.009, "ia3": 0.5}
    assert [trial.value for trial in outcome.searched["full"].told if trial.chosen] == [
        pytest.approx(0.001)
    ]
    # The highest rate diverged: known, and no reason to fail.
    assert [trial.learning_rate for trial in outcome.searched["full"].trials] == rates
    assert outcome.searched["full"].trials[-1].value is None
    assert hands.failed == {}


def test_a_trial_whose_losses_are_no_numbers_counts_as_diverged(place: Path) -> None:
    """Its training came to an end, and its measuring met what it had made."""

    class Overflowing(Making):
        def make(self, step: Step) -> Made:
            if step.call.stage == "evaluate" and (step.trial or 0) > 0.05:
                raise DivergedError("the loss of 3 of 9 test rows is not finite")
            return super().make(step)

    search = {"learning_rate": [0.001, 0.02, 0.1], "trials": 3}
    each = calls(place, search=search)
    outcome = story(each, Overflowing(each.home))
    for found in outcome.searched.values():
        assert [trial.value is None for trial in found.trials] == [False, False, True]
        assert found.best.learning_rate == 0.001  # 0.009 from 0.01, and the other one 0.01


def test_a_search_looks_at_no_test_row(place: Path) -> None:
    """Its rows are cut from train, beside those that the recipe holds out itself."""
    step = calls(place).prepare(0.1)
    assert step.call.spec["data"]["test"] == {"holdout": 0.1, "after": 0.2}
    (place / "test.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    given = {"train": {"path": "train.jsonl"}, "test": {"path": "test.jsonl"}}
    step = calls(place, data=given).prepare(0.1)
    assert step.call.spec["data"]["test"] == {"holdout": 0.1, "after": 0.0}
    assert set(step.call.outside) == {"base", "train"}


def test_drawn_rates_are_the_same_every_time(place: Path) -> None:
    search = {"learning_rate": {"low": 1e-4, "high": 1.0}, "trials": 7}
    rates = []
    for home in ("one", "two"):
        each = calls(place, Home(place / home), search=search)
        hands = Making(each.home)
        story(each, hands)
        rates.append([step.trial for step in hands.made if step.trial is not None])
    assert rates[0] == rates[1]
    drawn = set(rates[0])
    assert len(drawn) == 7
    assert all(1e-4 <= rate <= 1.0 for rate in drawn)


def test_a_plan_says_what_of_a_search_is_known(place: Path) -> None:
    search = {"learning_rate": [0.001, 0.01, 0.1], "trials": 3}
    steps, later = planned(calls(place, search=search))
    titles = [found.step.title for found in steps]
    assert later["full: 2 more trials"] == "after the first"
    assert later["train full"] == "after its trials"
    assert "prepare for the search" in titles
    assert "train full at rate 0.001" in titles
    assert "train full" not in titles


def test_a_failed_candidate_does_not_sink_the_others(place: Path) -> None:
    hands = Making(calls(place).home, broken={"train full"})
    outcome = story(calls(place), hands)
    assert outcome.choice.label == "lora-r2"
    assert set(outcome.trained) == {"lora-r2"}
    assert hands.failed == {"full": "out of luck"}
    [page] = [step for step in hands.made if step.call.stage == "report"]
    assert page.call.spec["failed"] == {"full": "out of luck"}
    assert page.call.spec["labels"] == ["lora-r2"]
    # A second run makes what is missing and nothing else.
    again = Making(calls(place).home)
    before = {found.key for found in planned(calls(place))[0] if found.cached}
    story(calls(place), again)
    assert {step.title for step in again.made if key_of(step.call) not in before} >= {
        "train full",
        "evaluate full",
    }
    assert key_of(next(s for s in again.made if s.title == "train lora-r2").call) in before


def test_a_run_goes_on_without_a_prediction_and_says_so(place: Path) -> None:
    hands = Making(calls(place).home, broken={"cost", "cost base x 10"})
    outcome = story(calls(place), hands)
    assert hands.warned == [
        "what the candidates should cost is not known: out of luck",
        "what the candidates should cost on a base 10 times as large is not known: out of luck",
    ]
    assert outcome.promoted
    [page] = [step.call for step in hands.made if step.call.stage == "report"]
    assert "cost" not in page.inputs
    # Nothing is left to be made: the page is that of a run without one.
    assert already_done(calls(place), lambda version: True) is not None
    _, hands = told(calls(place))
    by_title = {step.title: step.call for step in hands.made}
    assert by_title["report"].inputs["cost"] == key_of(by_title["cost"])
    assert by_title["cost"].inputs["prepared"] == key_of(by_title["prepare"])
    assert by_title["report"].inputs["larger"] == key_of(by_title["cost base x 10"])


def test_where_nothing_is_trained_no_cost_is_told(place: Path) -> None:
    changes = {"candidates": [{"method": "zero_shot"}], "select": {"minimize": "loss"}}
    _, hands = told(calls(place, **changes))
    assert not any(step.call.stage == "cost" for step in hands.made)


def test_a_seed_that_fails_takes_its_candidate_with_it(place: Path) -> None:
    hands = Making(calls(place).home, broken={"train full seed 5"})
    outcome = story(calls(place, **THREE), hands)
    assert set(outcome.trained) == {"lora-r2"}
    assert not any(step.title == "evaluate full" for step in hands.made)


def test_where_all_fail_the_run_fails_with_what_each_met(place: Path) -> None:
    hands = Making(calls(place).home, broken={"train full", "train lora-r2"})
    with pytest.raises(StageError, match=r"full: out of luck\nlora-r2: out of luck"):
        story(calls(place), hands)


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


def test_a_prompt_that_no_seed_changes_stands_for_all_seeds(place: Path) -> None:
    candidates = [{"method": "zero_shot"}, {"method": "lora", "rank": 2}]
    _, hands = told(calls(place, candidates=candidates, **THREE))
    by_title = {step.title: step.call for step in hands.made}
    own = [step.title for step in hands.made if step.label == "zero_shot"]
    assert own == ["train zero_shot", "evaluate zero_shot"]
    read = by_title["compare"].inputs
    measured = key_of(by_title["evaluate zero_shot"])
    assert [read[f"zero_shot/{seed}"] for seed in (3, 5, 8)] == [measured] * 3
    assert len({read[f"lora-r2/{seed}"] for seed in (3, 5, 8)}) == 3
