"""Where Turbo heads stand in the story, who reads them, and what does not depend on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.plan import already_done, planned
from schemas.turbo import Turbo
from tasks.core.store import key_of
from tests.flows.hands import calls, changed, keys, told

HEADS = {"finish": {"turbo": {"heads": 3}}}
BOTH = [{"method": "full"}, {"method": "lora", "rank": 2}]


def turbo_lora(**turbo: Any) -> dict[str, Any]:
    own = {"method": "turbo_lora", "rank": 2, "turbo": turbo}
    return {"candidates": [{"method": "full"}, own]}


def test_heads_come_after_merge_and_are_read_by_all_that_follows(place: Path) -> None:
    _, hands = told(calls(place, **HEADS))
    titles = [step.title for step in hands.made]
    assert titles[-6:] == [
        "compare",
        "merge lora-r2",
        "turbo lora-r2",
        "evaluate finished",
        "report",
        "register",
    ]
    by_title = {step.title: step.call for step in hands.made}
    turbo = by_title["turbo lora-r2"]
    assert turbo.format == "heads"
    assert turbo.inputs == {
        "prepared": key_of(by_title["prepare"]),
        "subject": key_of(by_title["merge lora-r2"]),
    }
    assert turbo.spec["turbo"] == Turbo(heads=3).model_dump()
    for title, name in (
        ("evaluate finished", "heads"),
        ("report", "turbo"),
        ("register", "heads"),
    ):
        assert by_title[title].inputs[name] == key_of(turbo)
        assert by_title[title].paths[name].endswith(key_of(turbo))
    # Candidates are compared without.
    assert not any("heads" in by_title[f"evaluate {who}"].inputs for who in ("base", "lora-r2"))


def test_what_is_not_merged_has_heads_of_its_own(place: Path) -> None:
    unmerged = {"finish": {"merge": False, "turbo": {}}}
    _, hands = told(calls(place, **unmerged))
    by_title = {step.title: step.call for step in hands.made}
    assert by_title["turbo lora-r2"].inputs["subject"] == key_of(by_title["train lora-r2"])
    bare = {"candidates": [{"method": "none"}, BOTH[0]], "select": {"minimize": "loss"}, **HEADS}
    outcome, hands = told(calls(place, **bare), zero_shot=0.5)
    by_title = {step.title: step.call for step in hands.made}
    assert outcome.choice.label == "zero_shot"
    assert by_title["turbo zero_shot"].inputs["subject"] == key_of(by_title["train zero_shot"])


def test_heads_change_no_training_no_merge_and_no_other_evaluation(place: Path) -> None:
    """That a merge reads `finish` must not make its result depend on heads."""
    without, some = keys(calls(place)), keys(calls(place, **HEADS))
    assert changed(without, some) == {"evaluate finished", "report", "register"}
    more = keys(calls(place, finish={"turbo": {"heads": 4}}))
    assert changed(some, more) == {"turbo lora-r2", "evaluate finished", "report", "register"}


def test_how_often_a_checkpoint_is_written_makes_no_other_heads(place: Path) -> None:
    often, seldom = (
        keys(calls(place, finish={"turbo": {"checkpoint_every_s": s}})) for s in (1, 100)
    )
    assert changed(often, seldom) == {"report"}  # which shows the recipe as it is


def test_turbo_lora_shares_loras_training(place: Path) -> None:
    plain, turbo = keys(calls(place, candidates=BOTH)), keys(calls(place, **turbo_lora(heads=2)))
    for stage in ("train", "evaluate", "merge"):
        assert plain[f"{stage} lora-r2"] == turbo[f"{stage} turbo_lora-r2"]
    assert "turbo turbo_lora-r2" in turbo
    other = keys(calls(place, **turbo_lora(heads=4)))
    assert other["train turbo_lora-r2"] == turbo["train turbo_lora-r2"]
    assert other["turbo turbo_lora-r2"] != turbo["turbo turbo_lora-r2"]
    wider = [{"method": "turbo_lora", "rank": 2, "alpha": 5}]
    assert keys(calls(place, candidates=wider))["train turbo_lora-r2"] != plain["train lora-r2"]


def test_only_the_selected_ones_own_heads_are_made(place: Path) -> None:
    # The other candidate is too large for RECIPE's bound.
    _, hands = told(calls(place, **turbo_lora(heads=2)))
    [turbo] = [step for step in hands.made if step.call.stage == "turbo"]
    assert (turbo.label, turbo.call.spec["turbo"]["heads"]) == ("turbo_lora-r2", 2)
    chosen = {"select": {"minimize": "loss"}}
    _, hands = told(calls(place, **turbo_lora(heads=2), **chosen), full=0.5)
    assert not any(step.call.stage == "turbo" for step in hands.made)
    # Its own come before those of `finish`.
    _, hands = told(calls(place, **turbo_lora(heads=2), **HEADS))
    [turbo] = [step for step in hands.made if step.call.stage == "turbo"]
    assert turbo.call.spec["turbo"]["heads"] == 2


@pytest.mark.parametrize("changes", [HEADS, turbo_lora(heads=2)], ids=["finish", "turbo_lora"])
def test_a_plan_names_them_and_a_second_run_finds_them(place: Path, changes: Any) -> None:
    later = planned(calls(place, **changes))[1]
    assert list(later) == ["merge", "turbo", "evaluate finished", "report", "register"]
    assert already_done(calls(place, **changes), lambda version: True) is None
    told(calls(place, **changes))
    done = already_done(calls(place, **changes), lambda version: True)
    assert done is not None
    assert len(done[1]) == 15
