"""What is refused before anything heavy is imported: a base or rows that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.calls import Calls
from flows.home import Home
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
