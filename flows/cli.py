"""The command line. Heavy libraries are imported by the commands that need them, when they do."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flows.home import Home
from flows.records import EXIT_CODES, begun_here
from flows.screen import Screen, console
from flows.tell import is_users, problems_of
from schemas.errors import StageError, UserError
from schemas.export import ExportFormat
from tasks.core.store import storage_errors

app = typer.Typer(
    name="peftflow",
    help="One YAML recipe: validated data, tuned adapters, a five-criteria comparison, "
    "a registered model. Exit codes: 0 done, 1 failed, 2 wrong input, 3 refused by the gate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A registered model.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value: train.epochs=1"),
]
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Default: PEFTFLOW_HOME, else ./.peftflow"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object, last on stdout.")]
JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        min=1,
        help="Trainings side by side, each with a share of the cores, or a GPU of its own. "
        "Training times are then those of a shared machine; all that measures time runs alone.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="SIZE", help="e.g. 24GiB. Default: what is free here."),
]
WhyOption = Annotated[str, typer.Option("--why", help="Kept in the ledger.")]

#: A command's own work, which gives its exit code.
Work = Callable[[Screen, Home], int]


@app.command()
def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    home: HomeOption = None,
    jobs: JobsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe to its end: data, candidates, comparison, registered model, promotion."""
    from flows.run import run as run_recipe
    from flows.tables import last_line, outcome

    def work(screen: Screen, place: Home) -> int:
        record = run_recipe(recipe, set_ or [], place, screen, jobs)
        screen.console.print(outcome(record), highlight=False)
        screen.console.print(last_line(record), highlight=False)
        if as_json:
            print(record.model_dump_json())
        return EXIT_CODES[record.state]

    guarded(work, home, as_json)


@app.command()
def check(
    recipe: RecipeArgument,
    set_: SetOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Recipe and data only: rows in, kept, refused with reasons, truncated, without a label."""
    from flows.check import check as check_recipe

    def work(screen: Screen, place: Home) -> int:
        report = check_recipe(recipe, set_ or [], place, screen)
        if as_json:
            print(report.model_dump_json())
        return 0

    guarded(work, home, as_json)


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    home: HomeOption = None,
    device: DeviceOption = None,
) -> None:
    """What each candidate would cost, whether it fits, and what is in the store already."""
    from flows.check import plan_recipe
    from flows.tables import cost_lines, cost_table, plan_table

    def work(screen: Screen, place: Home) -> int:
        plan = plan_recipe(recipe, set_ or [], place, device)
        screen.console.print(cost_table(plan.costs))
        screen.console.print(cost_lines(plan.costs), highlight=False)
        if plan.steps:
            screen.console.print(plan_table(plan.steps, plan.later))
        return 0

    guarded(work, home)


@app.command()
def status(home: HomeOption = None) -> None:
    """The servers, the last runs, and the champions."""
    from flows.history import status as show

    def work(screen: Screen, place: Home) -> int:
        screen.console.print(show(place), highlight=False)
        return 0

    guarded(work, home)


@app.command()
def report(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="Default: the last.")] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """The figures of a run and the path of its HTML report."""
    from flows.history import find_run
    from flows.tables import outcome

    def work(screen: Screen, place: Home) -> int:
        record = find_run(place, run)
        screen.console.print(outcome(record), highlight=False)
        if as_json:
            print(record.model_dump_json())
        return 0

    guarded(work, home, as_json)


@app.command()
def compare(name: NameArgument, home: HomeOption = None) -> None:
    """The versions of a registered model side by side."""
    from flows.tables import versions_table
    from tasks.register.registry import versions

    def work(screen: Screen, place: Home) -> int:
        place.open()
        table = versions_table(name, versions(place.root, name))
        screen.console.print(table, highlight=False)
        return 0

    guarded(work, home)


@app.command()
def promote(
    name: NameArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION")],
    why: WhyOption = "promoted by hand",
    home: HomeOption = None,
) -> None:
    """Make a version the champion."""
    from tasks.register.promote import promote as promote_version

    def work(screen: Screen, place: Home) -> int:
        place.open()
        promotion = promote_version(place.root, name, version, why, gate={})
        word = "is now" if promotion.entry else "was already"
        screen.console.print(f"{name} version {version} {word} the champion", highlight=False)
        return 0

    guarded(work, home)


@app.command()
def rollback(name: NameArgument, why: WhyOption = "rollback", home: HomeOption = None) -> None:
    """Give `champion` back to the version before the present one."""
    from tasks.register.promote import rollback as roll_back

    def work(screen: Screen, place: Home) -> int:
        place.open()
        entry = roll_back(place.root, name, why)
        screen.console.print(
            f"{name}: champion went from version {entry.from_version} to {entry.to_version}",
            highlight=False,
        )
        return 0

    guarded(work, home)


@app.command()
def generate(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="NAME@champion, or NAME/3.")],
    prompt: Annotated[str, typer.Option("--prompt", help="As the recipe's rows have it.")],
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Default: the version's own.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0: the likeliest tokens.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=1e-6, max=1)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.")] = 0,
    turbo: Annotated[bool, typer.Option(help="With its Turbo heads, and beside them without.")] = (
        True
    ),
    home: HomeOption = None,
) -> None:
    """Stream a registered version's answer, and say how fast it came, with heads and without."""
    from flows.generate import Asked
    from flows.generate import generate as answer

    def work(screen: Screen, place: Home) -> int:
        asked = Asked(version, prompt, max_new_tokens, temperature, top_p, seed, turbo)
        answer(place, asked, screen)
        return 0

    guarded(work, home, aside=True)


@app.command()
def export(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="NAME@champion, or NAME/3.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new directory.")],
    form: Annotated[ExportFormat, typer.Option("--format", help="docs/export.md has them all.")],
    home: HomeOption = None,
) -> None:
    """Write a registered version as PEFT, transformers, vLLM, LoRAX or TGI read it."""
    from flows.export import export as write

    def work(screen: Screen, place: Home) -> int:
        for line in write(place, version, form, out):
            screen.line(f"  warning: {line}", style="yellow")
        screen.line(f"{version} is in {out} as {form}; its README.md says how to use it")
        return 0

    guarded(work, home)


@app.command()
def up(home: HomeOption = None) -> None:
    """Start one Prefect server and the MLflow UI, to stay until `peftflow down`."""
    from flows.servers import up as start

    def work(screen: Screen, place: Home) -> int:
        place.open()
        with screen.waiting("starting Prefect and MLflow"):
            servers = start(place)
        for server in servers:
            screen.console.print(f"{server.name:<8} {server.url}", highlight=False)
        if place.mlflow_server:
            screen.line(f"mlflow   {place.mlflow_server} (MLFLOW_TRACKING_URI)")
        prefect = next(server for server in servers if server.name == "prefect")
        screen.console.print(
            f"\nFor `prefect deploy` and a worker (docs/runbook.md):\n"
            f"  export PREFECT_API_URL={prefect.api} PEFTFLOW_HOME={place.root}",
            soft_wrap=True,
            highlight=False,
        )
        return 0

    guarded(work, home)


@app.command()
def down(home: HomeOption = None) -> None:
    """Stop what `up` started."""
    from flows.servers import down as stop

    def work(screen: Screen, place: Home) -> int:
        stopped = stop(place)
        screen.console.print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was up")
        return 0

    guarded(work, home)


@app.command()
def doctor(home: HomeOption = None) -> None:
    """What is wrong with this machine. Exits with 1 where something is broken."""
    from flows.doctor import examine
    from flows.tables import findings_table

    def work(screen: Screen, place: Home) -> int:
        with screen.waiting("looking"):
            findings = examine(place)
        screen.console.print(findings_table(findings))
        return int(any(finding.verdict == "broken" for finding in findings))

    guarded(work, home)


@app.command()
def schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from schemas.load import recipe_json_schema

    print(json.dumps(recipe_json_schema(), indent=1))


def guarded(work: Work, home: Path | None, as_json: bool = False, aside: bool = False) -> None:
    """Run a command and exit: with its own code, or 1 failed, 2 wrong input, 130 interrupted.

    aside: standard output is the command's own; what is said of it goes to standard error.

    as_json: standard output is kept for one JSON object; people read standard error. After a
    failure it is the run's record, or before a run has begun its state and errors alone.
    """
    screen, place = Screen(console(stderr=as_json or aside)), Home.find(home)
    problem: BaseException | None = None
    try:
        with storage_errors(place.root):
            code = work(screen, place)
    except (UserError, StageError) as error:
        code, problem = 2 if is_users(error) else 1, error
        screen.error(error)
    except KeyboardInterrupt as error:
        code, problem = 130, error
        screen.line("interrupted: run again to go on from here")
    except Exception as error:
        code, problem = 1, error
        traceback.print_exc()
    if problem is not None and as_json:
        record = begun_here(place)
        if record is None:
            state = "wrong-input" if code == 2 else "failed"
            print(json.dumps({"state": state, "errors": problems_of(problem)}))
        else:
            print(record.model_dump_json())
    sys.exit(code)


if __name__ == "__main__":
    app()
