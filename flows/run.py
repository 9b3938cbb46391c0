"""What `peftflow run` does: nothing if all is done, else the Prefect flow with a server to tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.calls import Calls
from flows.home import Home
from flows.plan import already_done
from flows.records import RunRecord, StageLine, new_run_id, now
from flows.screen import Screen
from flows.servers import prefect_api
from flows.standing import was_promoted
from flows.tell import finish
from schemas.errors import StageError
from schemas.load import load_recipe

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

#: Prefect in this process: quiet on the console (the screen speaks), complete towards the server.
PREFECT_CLIENT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "true",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
}


def run(
    recipe_path: Path, overrides: list[str], home: Home, screen: Screen, jobs: int = 1
) -> RunRecord:
    """Run a recipe to its end; what a run finds done already it leaves as it is.

    jobs: trainings side by side.

    Raises:
        UserError: the recipe, the data, the base or the home is wrong.
        StageError: a stage failed.
    """
    recipe = load_recipe(recipe_path, overrides)
    home.open()
    with screen.waiting("reading the base and the data"):
        calls = Calls(recipe, recipe_path, home)
        done = already_done(calls, lambda version: was_promoted(home, version))
    if done is None:
        return run_flow(recipe_path, overrides, home, screen, jobs)
    outcome, found = done
    run_id = new_run_id(recipe.name)
    record = RunRecord(run_id=run_id, recipe=str(recipe_path), name=recipe.name, all_cached=True)
    record.stages = [
        StageLine(
            stage=step.step.call.stage,
            label=step.step.label,
            key=step.key,
            cached=True,
            seconds=step.seconds,
        )
        for step in found
    ]
    finish(record, outcome, home)
    record.ended = now()
    record.save(home)
    return record


def run_flow(
    recipe_path: Path, overrides: list[str], home: Home, screen: Screen, jobs: int
) -> RunRecord:
    """The Prefect flow in this process, reported to a server that is up at least until the end."""
    with prefect_api(home) as api:
        os.environ |= home.environment(offline=False) | PREFECT_CLIENT
        os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
        with screen.waiting("starting Prefect"):
            # The server comes up while Prefect is imported here.
            os.environ["PREFECT_API_URL"] = api.url
            from flows.pipeline import SESSION, Session, flush, pipeline

            api.ready()
        session = Session(screen)
        SESSION.set(session)
        try:
            ended = pipeline(str(recipe_path), overrides, str(home.root), jobs, return_state=True)
        finally:
            flush()
    if session.record is None or session.record.state not in ("done", "refused"):
        state = cast("State[Any]", ended)
        state.result()  # raises what ended the flow
        raise StageError(f"the flow ended as {state.name}: {state.message}")
    return session.record
