"""Every recipe that is shipped is one, and says how to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from schemas.recipe import Recipe
from schemas.report import figure_names

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_begins_with_its_command(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f"# peftflow run recipes/{path.name}\n# yaml-language-server: $schema=")
    recipe = Recipe.model_validate(yaml.safe_load(text))
    bounds = {**recipe.register_.gate, **recipe.select.subject_to}
    goal = recipe.select.maximize or recipe.select.minimize
    measured = recipe.evaluate
    known = figure_names(recipe.task, measured.batch_sizes, measured.prompt_lengths)
    assert {goal, *bounds} <= set(known)
