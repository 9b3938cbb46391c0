"""Sizes, and what is said of a candidate that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.check import check
from flows.cost import Costs, fits, in_all, size_mib
from flows.home import Home
from flows.screen import Screen, console
from flows.tables import cost_lines, cost_table
from schemas.cost import Cost
from schemas.errors import UserError
from schemas.recipe import Recipe


def cost(weights: float, learned: float, activations: float, checkpointing: bool = False) -> Cost:
    parts = {
        "weights": weights,
        "gradients": learned / 3,
        "optimiser": learned * 2 / 3,
        "activations": activations,
        "rest": 10.0,
    }
    return Cost(
        trainable_parameters=1,
        trainable_share=0.1,
        shipped_mib=1.0,
        training_mib={**parts, "total": sum(parts.values())},
        inference_mib=weights,
        forward_flops_per_token=2.0,
        backward_flops_per_token=3.0,
        step_flops=100.0,
        steps=10,
        tokens=1000,
        gradient_checkpointing=checkpointing,
    )


#: A prompt: nothing is trained.
PROMPT = Cost(trainable_parameters=0, trainable_share=0.0, shipped_mib=None, inference_mib=90.0)


def test_a_size_is_a_number_and_a_unit():
    assert size_mib("24GiB") == 24 * 1024
    assert size_mib(" 1.5 tib") == 1.5 * 2**20
    for wrong in ("24", "24GB", "GiB", "-1GiB"):
        with pytest.raises(UserError, match="24GiB"):
            size_mib(wrong)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (cost(100, 50, 200), "yes"),
        (cost(100, 50, 400), "no: gradient_checkpointing"),
        (cost(100, 50, 400, True), "no: less micro_batch_tokens"),
        (cost(300, 900, 10), "no: train less"),
        (cost(600, 9, 10), "no: smaller base or 4 bits"),
        (PROMPT, "yes"),
        (PROMPT.model_copy(update={"inference_mib": 501.0}), "no: smaller base"),
    ],
)
def test_what_does_not_fit_is_told_what_to_change(given, expected):
    assert fits(given, 500) == expected


def test_a_shape_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = {
        "name": "tiny",
        "task": "causal-lm",
        "base": {"shape": {"model_type": "llama"}, "dtype": "float32"},
        "data": {"train": {"path": "train.jsonl"}, "test": {"holdout": 0.2}},
        "candidates": [{"method": "full"}],
        "select": {"minimize": "loss"},
        "register": {"name": "tiny"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"base\.shape[\s\S]*plan` alone"):
        check(path, [], Home(tmp_path / "home"), Screen(console(stderr=True)))


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "task": "causal-lm",
            "base": {"shape": {"model_type": "llama"}},
            "data": {"train": {"path": "train.jsonl"}, "test": {"holdout": 0.2}},
            "candidates": [
                {"method": "zero_shot"},
                {"method": "lora"},
                {"method": "ia3", "train": {"learning_rate": 0.1}},
            ],
            "select": {"minimize": "loss"},
            "register": {"name": "tiny"},
            **changes,
        }
    )


def test_all_seeds_and_trials_are_counted():
    """Each of two trained candidates costs 10 steps of 100 and 1,000 tokens of 5 FLOPs."""
    found = {"zero_shot": PROMPT, "lora-r16": cost(1, 1, 1), "ia3": cost(1, 1, 1)}
    once = 10 * 100 + 1000 * 5
    assert in_all(recipe(), found) == (2, 2 * once)
    assert in_all(recipe(seeds=[0, 1, 2]), found) == (6, 6 * once)
    # IA3 has a rate of its own. A quarter as many epochs, on nine tenths of the rows.
    search = {"learning_rate": [1e-3, 1e-2], "trials": 5, "share": 0.25, "holdout": 0.1}
    both = recipe(seeds=[0, 1, 2], search=search)
    assert in_all(both, found) == (8, pytest.approx((6 + 2 * 0.25 * 0.9) * once))
    by_steps = recipe(search=search, train={"max_steps": 10})
    assert in_all(by_steps, found) == (4, pytest.approx((2 + 2 * 0.25) * once))
    unknown = found["ia3"].model_copy(update={"tokens": None, "steps": None})
    assert in_all(both, found | {"ia3": unknown}) == (8, None)


def test_a_prompt_has_dashes_and_is_said_to_train_nothing():
    screen = console(stderr=False)
    found = Costs({"asked": PROMPT, "lora": cost(1, 1, 1)}, 500.0, "here", 1e3, True, 3, 18e3)
    with screen.capture() as printed:
        screen.print(cost_table(found), cost_lines(found))
    lines = printed.get().splitlines()
    [row] = [line for line in lines if line.startswith("asked ")]
    assert row.split() == ["asked", *["–"] * 4, "90", "MiB", "–", "–", "yes"]
    assert "asked: trains nothing" in lines
    assert any(line.strip().startswith("in all: 3 trainings, about 18") for line in lines)
