"""Sizes, and what is said of a candidate that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.check import check
from flows.cost import fits, size_mib
from flows.home import Home
from flows.screen import Screen, console
from schemas.errors import UserError


def cost(weights: float, learned: float, activations: float, checkpointing: bool = False) -> Any:
    parts = {
        "weights": weights,
        "gradients": learned / 3,
        "optimiser": learned * 2 / 3,
        "activations": activations,
        "rest": 10.0,
    }
    return {
        "training_mib": {**parts, "total": sum(parts.values())},
        "gradient_checkpointing": checkpointing,
    }


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
