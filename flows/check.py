"""`peftflow check` and `peftflow plan`: what can be said before anything is trained."""

from __future__ import annotations

from pathlib import Path

from flows.calls import Calls
from flows.home import Home
from flows.hub import offline
from flows.plan import Found, planned
from flows.screen import Screen
from flows.work import Bench
from schemas.load import load_recipe
from schemas.report import DataReport


def check(recipe_path: Path, overrides: list[str], home: Home, screen: Screen) -> DataReport:
    """Inspect the candidates and prepare the rows. A run finds both in the store.

    Raises:
        UserError: the recipe, a candidate, the data, the base or the home is wrong.
    """
    recipe = load_recipe(recipe_path, overrides)
    home.open()
    calls = Calls(recipe, recipe_path, home)
    bench = Bench(home, screen, offline=offline(recipe))
    bench.make(calls.inspect())
    rows, _ = bench.make(calls.prepare())
    return DataReport.model_validate_json((rows.path / "data_report.json").read_bytes())


def plan_recipe(
    recipe_path: Path, overrides: list[str], home: Home
) -> tuple[list[Found], list[str]]:
    """The steps that can be told now, and the names of those that follow the selection."""
    recipe = load_recipe(recipe_path, overrides)
    home.open()
    return planned(Calls(recipe, recipe_path, home))
