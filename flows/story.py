"""The pipeline, once, from rows to a promoted model.

`plan`, the check that everything is already done, and the Prefect flow all read this story; they
differ in the hands that they lend it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel

from flows.calls import Calls, Made, Step
from flows.select import Choice, choose
from schemas.candidates import Candidate
from schemas.errors import StageError
from schemas.report import CriteriaReport, GateVerdict, Registration
from tasks.register.gate import judge

Model = TypeVar("Model", bound=BaseModel)


class NotYetError(StageError):
    """What the story needs next is still to be made."""


class Hands(Protocol):
    """What the story needs done."""

    def make(self, step: Step) -> Made:
        """The entry of a step: found in the store, made, or (in a plan) only named."""

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        """Give the version `champion` if the recipe asks for it; whether it has had it."""


@dataclass(frozen=True)
class Outcome:
    """Where the story ended: the entries and what was decided."""

    rows: Path
    trained: dict[str, Path]
    reports: dict[str, CriteriaReport]
    choice: Choice
    page: Path
    registration: Registration
    verdict: GateVerdict
    promoted: bool


def story(calls: Calls, hands: Hands) -> Outcome:
    """From the recipe to a promoted model; what a step reads says what it waits for."""
    recipe = calls.recipe
    candidates = {candidate.label: candidate for candidate in recipe.candidates}

    hands.make(calls.inspect())
    rows = hands.make(calls.prepare())
    trained = {
        label: hands.make(calls.train(candidate, rows)) for label, candidate in candidates.items()
    }
    evaluated = {"base": hands.make(calls.evaluate("base", rows, None))}
    for label in candidates:
        evaluated[label] = hands.make(calls.evaluate(label, rows, trained[label]))

    figures = {label: criteria(evaluated[label]).figures() for label in candidates}
    choice = choose(recipe.select, figures)

    finished, chosen = trained[choice.label], candidates[choice.label]
    if recipe.finish.merge and not chosen.MERGES and chosen.FORMAT != "transformers":
        choice = replace(choice, why=f"{choice.why}; {chosen.method} {unmerged(chosen)}")
    if recipe.finish.merge and chosen.MERGES:
        finished = hands.make(calls.merge(choice.label, rows, finished))
    evaluated["finished"] = hands.make(calls.evaluate("finished", rows, finished))

    page = hands.make(calls.page(page_inputs(rows, trained, evaluated), choice.label, choice.why))
    registered = hands.make(calls.register(rows, finished, evaluated["finished"], page))
    registration = read(Registration, registered.path / "registration.json")

    reports = {label: criteria(entry) for label, entry in evaluated.items()}
    verdict = judge(recipe.register_.gate, reports["finished"].figures())
    promoted = hands.promote(registration, verdict)
    paths = {label: entry.path for label, entry in trained.items()}
    return Outcome(
        rows.path,
        paths,
        reports,
        choice,
        page.path / "report.html",
        registration,
        verdict,
        promoted,
    )


def unmerged(candidate: Candidate) -> str:
    """How a candidate is served that cannot be folded into its base."""
    if candidate.FORMAT == "prompt":
        return "has no weights to merge and is served as its base and what stands before a prompt"
    return "cannot be merged and is served beside its base"


def page_inputs(
    rows: Made, trained: dict[str, Made], evaluated: dict[str, Made]
) -> dict[str, Made]:
    """What the HTML report is made from, by the names of `schemas.stages.PageSpec`."""
    curves = {f"train:{label}": entry for label, entry in trained.items()}
    reports = {f"evaluate:{label}": entry for label, entry in evaluated.items()}
    return {"prepared": rows, **curves, **reports}


def criteria(evaluated: Made) -> CriteriaReport:
    return read(CriteriaReport, evaluated.path / "criteria.json")


def read(model: type[Model], path: Path) -> Model:
    """A file of an entry, checked.

    Raises:
        NotYetError: the entry is still to be made.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise NotYetError(f"{path} is not there") from None
