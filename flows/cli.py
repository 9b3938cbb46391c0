"""The command line. Heavy libraries are imported by the commands that need them, when they do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.home import Home
from flows.records import EXIT_CODES, RunRecord
from flows.screen import Screen
from schemas.errors import StageError, UserError

app = typer.Typer(
    name="peftflow",
    help="One YAML recipe: validated data, tuned adapters, a five-criteria comparison, "
    "a registered model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: train.epochs=1"),
]
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Default: PEFTFLOW_HOME, else ./.peftflow"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object, last on stdout.")]


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe to its end: data, candidates, comparison, registered model, promotion."""
    from flows import run as runs
    from flows.tables import outcome

    screen = Screen(Console(stderr=as_json))

    def work() -> int:
        record = runs.run(recipe, set_ or [], Home.find(home), screen)
        screen.console.print(outcome(record))
        screen.console.print(summary(record), highlight=False)
        if as_json:
            print(record.model_dump_json())
        return EXIT_CODES[record.state]

    guarded(work, screen, as_json)


def summary(record: RunRecord) -> str:
    """The last line of a run."""
    name = record.run_id
    if record.all_cached:
        return f"\nEverything is already done: {len(record.stages)} stages found, nothing to make."
    made = sum(not line.cached for line in record.stages)
    word = "Refused by the gate" if record.state == "refused" else "Done"
    return f"\n{word}: run {name}, {made} of {len(record.stages)} stages made."


def guarded(work: Callable[[], int], screen: Screen, as_json: bool = False) -> None:
    """Run a command and exit as the issue's codes say: 1 failed, 2 wrong input, 130 interrupted."""
    from flows.tell import problems_of

    try:
        code = work()
    except (UserError, StageError) as error:
        code = 2 if isinstance(error, UserError) else 1
        screen.error(error)
        if as_json:
            state = "wrong-input" if code == 2 else "failed"
            print(json.dumps({"state": state, "errors": problems_of(error)}))
    except KeyboardInterrupt:
        code = 130
        screen.console.print("interrupted: run again to go on from here")
    sys.exit(code)


if __name__ == "__main__":
    app()
