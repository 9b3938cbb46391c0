"""`peftflow check` and `peftflow plan`: what can be said before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flows.calls import Calls
from flows.cost import Costs, costs, maker
from flows.home import Home
from flows.hub import offline
from flows.plan import Found, planned
from flows.rate import rates
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


@dataclass(frozen=True)
class Planned:
    """steps: those that can be told now. later: of the others the names, and what they wait for."""

    steps: list[Found]
    later: dict[str, str]
    costs: Costs


def plan_recipe(
    recipe_path: Path, overrides: list[str], home: Home, device: str | None = None
) -> Planned:
    """What each candidate would cost, and the steps. A base given by its shape has no steps, and
    of one whose weights are not here those that read none."""
    recipe = load_recipe(recipe_path, overrides)
    home.open()
    with maker(recipe, home) as make, rates(recipe.base.dtype, home) as rate:
        if recipe.base.shape is not None:
            return Planned([], {}, costs(recipe, None, home, device, make, rate))
        calls = Calls(recipe, recipe_path, home, planning=True)
        steps, later = planned(calls)
        return Planned(steps, later, costs(recipe, calls, home, device, make, rate))
