"""What is refused before anything heavy is imported, and what a prompt is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.calls import Calls
from flows.home import Home
from flows.plan import planned
from schemas.errors import UserError
from schemas.load import load_recipe

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "task": "causal-lm",
    "base": {"model": "base", "dtype": "float32"},
    "data": {"train": {"path": "train.jsonl"}, "test": {"holdout": 0.2}},
    "candidates": [{"method": "full"}],
    "select": {"minimize": "loss"},
    "register": {"name": "tiny"},
}


def opened(place: Path, **changes: Any) -> Calls:
    """The calls of RECIPE with whole sections replaced."""
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return Calls(load_recipe(path), path, Home(place / "home"))


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
        opened(place)


def test_a_plan_needs_no_weights_and_hashes_no_large_ones(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(place).home.open()
    recipe, home = place / "recipe.yaml", Home(place / "home")

    def plan() -> tuple[list[str], dict[str, str]]:
        steps, later = planned(Calls(load_recipe(recipe), recipe, home, planning=True))
        return [found.step.title for found in steps], later

    told, later = plan()
    assert "evaluate base" in told
    assert "evaluate base" not in later
    # The same weights, too many to be read by a plan that has not seen them.
    monkeypatch.setattr("flows.calls.PLANNED_BYTES", 0)
    (home.cache / "hashes.json").unlink(missing_ok=True)
    told, later = plan()
    assert told == ["inspect", "prepare", "cost", "cost base x 10"]
    assert later["evaluate base"].startswith("when a run has read the base's ")
    assert later["register"] == "after the selection"

    for weights in (place / "base").glob("*.safetensors"):
        weights.unlink()
    told, later = plan()
    assert told == ["inspect", "prepare", "cost", "cost base x 10"]
    assert later["train full"] == "when the base's weights are here"
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        Calls(load_recipe(recipe), recipe, home)
    (place / "base" / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="runs code when it is loaded"):
        plan()


def test_hub_rows_without_a_commit_are_refused(place: Path) -> None:
    with pytest.raises(UserError, match="no `revision`"):
        opened(place, data={"train": {"path": "hub:org/rows"}, "test": {"holdout": 0.2}})


def test_a_hub_base_without_a_network_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf download org/name --revision") as caught:
        opened(place, base={"model": "org/name", "revision": "0" * 40})
    assert "base.model" in caught.value.problems[0].place


def trained(place: Path, **changes: Any) -> dict[str, str]:
    """Title: key of the steps that train something, or would."""
    found, _ = planned(opened(place, **changes))
    return {one.step.title: one.key for one in found if one.step.call.stage == "train"}


def test_a_prompt_is_made_from_what_it_reads_alone(place: Path) -> None:
    """Not from the schedule, but from how many examples, how they are chosen, and the seed of
    those that are drawn."""

    def key(train: dict[str, Any] | None = None, **candidate: Any) -> str:
        asked = [{"method": "few_shot", "name": "shown", **candidate}]
        return trained(place, candidates=asked, train=train or {})["train shown"]

    first = key()
    assert key({"learning_rate": 1e-2, "max_steps": 9, "seed": 1}) == first
    drawn = [key({"seed": seed, "max_steps": 9 - seed}, choose="seed") for seed in (0, 1)]
    assert key({"seed": 1}, choose="seed") == drawn[1]
    assert len({first, *drawn, key(examples=3)}) == 4


def test_what_no_seed_changes_is_made_once(place: Path) -> None:
    asked = [
        {"method": "zero_shot"},
        {"method": "few_shot"},
        {"method": "few_shot", "choose": "seed"},
        {"method": "lora"},
    ]
    made = trained(place, candidates=asked, seeds=[3, 5], search={"learning_rate": [1e-3, 1e-2]})
    assert set(made) == {
        "train lora-r16 at rate 0.001",  # and by what it comes to, all else of lora
        "train zero_shot",
        "train few_shot-4",
        "train few_shot-4-seed seed 3",
        "train few_shot-4-seed seed 5",
    }
    assert len(set(made.values())) == 5
