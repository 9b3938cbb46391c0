"""The Prefect flow: the story of `flows/story.py`, each stage a task with its state and history.

peftflow run recipes/quickstart.yaml                       on this machine
prefect deploy --prefect-file infra/prefect.yaml --all     on a schedule, by a worker
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

from prefect import Task, flow, get_client, get_run_logger
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.states import Completed, Crashed, Failed

from flows.calls import Calls, Step
from flows.execute import Event
from flows.fan_out import fan_out
from flows.home import Home
from flows.hub import offline
from flows.records import RunRecord, StageLine, dead_runs, new_run_id, now
from flows.standing import was_promoted
from flows.story import story
from flows.tell import finish, is_users, problems_of
from flows.tracking import Tracker
from flows.work import Bench, Listener
from schemas.errors import RetryableError
from schemas.load import load_recipe
from schemas.recipe import Recipe
from schemas.report import GateVerdict, Registration
from tasks.core.store import Entry

T = TypeVar("T")

#: Seconds before a stage that may yet succeed (RetryableError) is tried again.
RETRY_AFTER_S = [3.0, 10.0]


@dataclass
class Session:
    """What the command line lends the flow, and the record that it gets back."""

    listener: Listener
    record: RunRecord | None = None


SESSION: ContextVar[Session | None] = ContextVar("session", default=None)


def recipe_stem() -> str:
    """A flow run is named after its recipe's file."""
    return Path(flow_run.parameters["recipe"]).stem


@flow(name="peftflow", flow_run_name=recipe_stem)
def pipeline(
    recipe: str, overrides: list[str] | None = None, home: str | None = None, jobs: int = 1
) -> Any:
    """Run a recipe to its end. Paths are relative to the working directory.

    jobs: trainings side by side, each with its share of the cores and a GPU of its own where
    there are some.

    The flow run is Failed, by the name of GateRefused, when the finished model does not pass.
    """
    session, path = SESSION.get(), Path(recipe).resolve()
    place = Home.find(Path(home) if home else None)
    place.open()
    os.environ |= place.environment(offline=False)
    loaded = load_recipe(path, overrides)
    record = RunRecord(
        run_id=new_run_id(loaded.name),
        recipe=str(path),
        name=loaded.name,
        prefect_flow_run=str(flow_run.id),
    )
    if session is not None:
        session.record = record
    listener = Prefect(session.listener if session else None)
    with recorded(record, place, loaded) as tracker:
        calls = Calls(loaded, path, place)
        bench = Bench(place, listener, offline=offline(loaded))
        outcome = story(calls, Working(bench, calls, record, tracker, jobs))
        finish(record, outcome, place)
    if record.state == "refused":
        return Failed(name="GateRefused", message="the finished model does not pass the gate")
    return Completed(message=record.why)


class Working:
    """Hands that make what is missing, each step a Prefect task."""

    def __init__(
        self, bench: Bench, calls: Calls, record: RunRecord, tracker: Tracker, jobs: int
    ) -> None:
        self._bench, self._record, self._tracker = bench, record, tracker
        self._calls, self._jobs = calls, jobs
        self._lock = Lock()
        self.failed: dict[str, str] = record.failed

    def make(self, step: Step) -> Entry:
        entry = run_task(step.call.stage, step.title, lambda: self._make(step))
        stage = step.call.stage
        if step.trial is not None:
            return entry
        if stage == "train":
            self._tracker.trained(step, entry)
        elif stage == "evaluate":
            self._tracker.evaluated(step, entry)
        elif stage == "report":
            self._tracker.reported(entry.path / "report.html")
        return entry

    def each(self, works: Mapping[str, Callable[[], T]], *, alone: bool = False) -> dict[str, T]:
        return fan_out(works, 1 if alone else self._jobs, self._fail)

    def _fail(self, name: str, error: Exception) -> None:
        """Said at once, kept in the record, and in MLflow's run of that candidate."""
        # The log's place is of this machine; the line on the screen has it.
        self.failed[name] = str(error).partition("\n    log:")[0]
        get_run_logger().warning("%s failed and is left out: %s", name, error)
        self._tracker.failed(name, str(error))

    def warn(self, words: str) -> None:
        """Said in the log, and kept in the record."""
        get_run_logger().warning("%s", words)
        self._record.warnings.append(words)

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        if not (self._calls.recipe.register_.promote and verdict.passed):
            return False
        if was_promoted(self._bench.home, registration):
            return True
        title = f"promote {registration.name} {registration.version}"
        return run_task("promote", title, lambda: Completed(data=self._promote(registration)))

    def _make(self, step: Step) -> State[Entry]:
        entry, line = self._bench.make(step)
        with self._lock:
            self._record.stages.append(line)
            self._record.save(self._bench.home)
        return Completed(name="Cached" if line.cached else "Made", message=line.key, data=entry)

    def _promote(self, registration: Registration) -> bool:
        from tasks.register.promote import promote

        register, home = self._calls.recipe.register_, self._bench.home
        why = f"run {self._record.run_id}"
        name, version = registration.name, registration.version
        return promote(home.root, name, version, why, register.gate).promoted


def run_task(name: str, title: str, work: Callable[[], State[T]]) -> T:
    """Run `work` as one Prefect task; its state is the one that `work` returns."""
    made: Task[[], Any] = Task(
        work,
        name=name,
        task_run_name=title,
        retries=len(RETRY_AFTER_S),
        retry_delay_seconds=RETRY_AFTER_S,
        retry_condition_fn=may_succeed_later,
        persist_result=False,
    )
    state: State[Any] = made(return_state=True)
    return cast(T, state.result())


def may_succeed_later(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Retries are for a full disk or a server that is away, not for a stage that fails."""
    return isinstance(state.result(raise_on_failure=False), RetryableError)


@contextmanager
def recorded(record: RunRecord, home: Home, recipe: Recipe) -> Iterator[Tracker]:
    """Keep the run's record and its MLflow runs true to how the block ends."""
    dead = bury(home)
    record.save(home)
    tracker = Tracker(home, recipe, record, dead)
    try:
        yield tracker
    except BaseException as error:
        record.state = "wrong-input" if is_users(error) else "failed"
        record.errors = problems_of(error)
        raise
    finally:
        record.ended = now()
        for problem in tracker.close():
            get_run_logger().warning("MLflow: %s", problem)
            record.warnings.append(f"MLflow has no record of a part of this run: {problem}")
        record.save(home)


def bury(home: Home) -> list[str]:
    """Say Crashed of the flow runs whose process was killed; the ids of their MLflow runs.

    Prefect itself would leave them Running for ever.
    """
    dead = dead_runs(home)
    with get_client(sync_client=True) as client:
        for run in dead:
            state: State[Any] = Crashed(message="its process was killed")
            if run.prefect_flow_run is not None:
                known = FlowRunFilter(id=FlowRunFilterId(any_=[run.prefect_flow_run]))
                for task_run in client.read_task_runs(flow_run_filter=known):
                    if task_run.state is None or not task_run.state.is_final():
                        client.set_task_run_state(task_run.id, state, force=True)
                for found in client.read_flow_runs(flow_run_filter=known):
                    client.set_flow_run_state(found.id, state, force=True)
            run.state, run.ended = "crashed", now()
            run.save(home)
    return [run.mlflow_run for run in dead if run.mlflow_run is not None]


class Prefect:
    """A listener that writes to the flow run's log, and tells another listener as well."""

    def __init__(self, other: Listener | None) -> None:
        self._other = other

    def begin(self, step: Step) -> None:
        if self._other is not None:
            self._other.begin(step)

    def event(self, step: Step, event: Event) -> None:
        if event["event"] == "warning":
            get_run_logger().warning("%s", event["message"])
        elif event["event"] == "note":
            get_run_logger().info("%s", event["message"])
        if self._other is not None:
            self._other.event(step, event)

    def end(self, step: Step, line: StageLine | None, entry: Entry | None) -> None:
        if self._other is not None:
            self._other.end(step, line, entry)


def flush() -> None:
    """Send what Prefect still holds back: task states travel as events, logs in batches."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all()
    APILogWorker.drain_all()
