"""The pipeline, once, from rows to a promoted model.

`plan`, the check that everything is already done, and the Prefect flow all read this story; they
differ in the hands that they lend it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel

from flows.calls import Calls, Made, NotYetError, Step, figures_of
from flows.search import Searched, require_metric, search_rate, wants_search
from flows.select import Choice, choose
from schemas.errors import StageError, UserError
from schemas.report import Comparison, CriteriaReport, GateVerdict, Registration
from schemas.together import Candidate
from tasks.register.gate import judge

#: What the report tells of a base that is so many times as large.
LARGER = 10.0

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class Hands(Protocol):
    """What the story needs done.

    failed: what `each` left out, and why.
    """

    failed: dict[str, str]

    def make(self, step: Step) -> Made:
        """The entry of a step: found in the store, made, or (in a plan) only named."""

    def each(self, works: Mapping[str, Callable[[], T]], *, alone: bool = False) -> dict[str, T]:
        """The results of works on several candidates, by label. One that fails is told and left
        out, and raises only where none is left.

        alone: one after the other, since they measure time.
        """

    def warn(self, words: str) -> None:
        """Say aloud what the run goes on without."""

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        """Give the version `champion` if the recipe asks for it; whether it has had it."""


@dataclass(frozen=True)
class Outcome:
    """Where the story ended: the entries and what was decided.

    trained: each candidate's entry of the first seed. reports: with the metrics of all seeds.
    """

    rows: Path
    trained: dict[str, Path]
    reports: dict[str, CriteriaReport]
    searched: dict[str, Searched]
    comparison: Comparison
    choice: Choice
    page: Path
    registration: Registration
    verdict: GateVerdict
    promoted: bool


@dataclass(frozen=True)
class Tuned:
    """A candidate's entries: of each seed what was trained, and of all but the first its score.

    Of one that no seed changes the first seed's alone.
    """

    trained: dict[int, Made]
    scored: dict[int, Made]


def story(calls: Calls, hands: Hands) -> Outcome:
    """From the recipe to a promoted model; what a step reads says what it waits for."""
    recipe = calls.recipe
    hands.make(calls.inspect())
    rows = hands.make(calls.prepare())
    told = expected(calls, hands, rows)
    # Before anything is trained: the rows may not have what the recipe chooses by.
    base = hands.make(calls.evaluate("base", rows, None))
    with suppress(NotYetError):
        require_metric(calls.metric, figures_of(base), "the test rows")

    candidates, searched = with_rates(calls, hands)
    tuned = tune(calls, hands, candidates, rows)
    candidates = {label: candidates[label] for label in tuned}
    first = recipe.all_seeds[0]
    trained = {label: entries.trained[first] for label, entries in tuned.items()}

    measures = {
        label: partial(lambda label: hands.make(calls.evaluate(label, rows, trained[label])), label)
        for label in candidates
    }
    measured = hands.each(measures, alone=True)
    seeds = {
        label: {seed: tuned[label].scored.get(seed, entry) for seed in recipe.all_seeds}
        for label, entry in measured.items()
    }
    compared = hands.make(calls.compare(seeds))
    comparison = read(Comparison, compared.path / "comparison.json")

    reports = {
        label: comparison.over_seeds(label, criteria(entry)) for label, entry in measured.items()
    }
    figures = {label: report.figures() for label, report in reports.items()}
    choice = choose(recipe.select, figures, comparison)

    finished, chosen = trained[choice.label], candidates[choice.label]
    if recipe.finish.merge and not chosen.MERGES and chosen.FORMAT != "transformers":
        method = " with ".join(part.method for part in chosen.parts)
        choice = replace(choice, why=f"{choice.why}; {method} {unmerged(chosen)}")
    if recipe.finish.merge and chosen.MERGES:
        finished = hands.make(calls.merge(choice.label, rows, finished))
    heads = None
    if (turbo := chosen.heads() or recipe.finish.turbo) is not None:
        heads = hands.make(calls.turbo(choice.label, turbo, rows, finished))
    evaluated = hands.make(calls.evaluate("finished", rows, finished, heads))

    trials = {label: found.told for label, found in searched.items()}
    curves = {f"train:{label}": trained[label] for label in measured}
    pages = {f"evaluate:{label}": entry for label, entry in measured.items()}
    pages = {"evaluate:base": base, **pages, "evaluate:finished": evaluated}
    inputs = {"prepared": rows, **curves, **pages, "comparison": compared, **told}
    if heads is not None:
        inputs["turbo"] = heads
    page = hands.make(calls.page(inputs, choice.label, choice.why, hands.failed, trials))
    registered = hands.make(calls.register(rows, finished, evaluated, page, heads))
    registration = read(Registration, registered.path / "registration.json")

    last = {"base": criteria(base), "finished": criteria(evaluated)}
    verdict = judge(recipe.register_.gate, last["finished"].figures())
    return Outcome(
        rows.path,
        {label: trained[label].path for label in measured},
        reports | last,
        searched,
        comparison,
        choice,
        page.path / "report.html",
        registration,
        verdict,
        hands.promote(registration, verdict),
    )


def expected(calls: Calls, hands: Hands, rows: Made) -> dict[str, Made]:
    """What the candidates should cost, for the page to hold what they did cost against, and what
    they would on a larger base.

    Nothing where none is trained, or where it cannot be told: that ends no run.
    """
    if not any(candidate.TRAINS for candidate in calls.recipe.candidates):
        return {}
    told = {}
    for name, times in (("cost", 1.0), ("larger", LARGER)):
        try:
            told[name] = hands.make(calls.cost(rows, times))
        except (StageError, UserError) as error:
            base = "" if times == 1 else f" on a base {times:g} times as large"
            hands.warn(f"what the candidates should cost{base} is not known: {error}")
    return told


def with_rates(calls: Calls, hands: Hands) -> tuple[dict[str, Candidate], dict[str, Searched]]:
    """The candidates with the learning rates that the search found for them, and its trials."""
    candidates = {candidate.label: candidate for candidate in calls.recipe.candidates}
    search = calls.recipe.search
    wanting = {label for label, one in candidates.items() if wants_search(one, search)}
    if search is None or not wanting:
        return candidates, {}
    rows = hands.make(calls.prepare(search.holdout))
    searched = hands.each(
        {
            label: partial(search_rate, calls, hands, candidates[label], rows)
            for label in candidates
            if label in wanting
        }
    )
    found: dict[str, Candidate] = {}
    for label, candidate in candidates.items():
        if label not in wanting:
            found[label] = candidate
        elif label in searched:
            rate = searched[label].best.learning_rate
            schedule = candidate.train.model_copy(update={"learning_rate": rate})
            found[label] = candidate.model_copy(update={"train": schedule})
    return found, searched


def tune(
    calls: Calls, hands: Hands, candidates: dict[str, Candidate], rows: Made
) -> dict[str, Tuned]:
    """Every candidate trained with every seed; those of which one failed are left out.

    All that does not measure time is done here, side by side where the hands can.
    """
    seeds = calls.recipe.all_seeds
    several = {label: len(seeds) > 1 and one.seeded for label, one in candidates.items()}

    def one(label: str, seed: int) -> tuple[Made, Made | None]:
        step = calls.train(candidates[label], rows, seed if several[label] else None)
        trained = hands.make(step)
        if seed == seeds[0]:
            return trained, None
        return trained, hands.make(calls.score(step, rows, trained))

    names = {
        label: {seed: f"{label} seed {seed}" for seed in seeds}
        if several[label]
        else {seeds[0]: label}
        for label in candidates
    }
    works = {
        own[seed]: partial(one, label, seed)
        for seed in seeds
        for label, own in names.items()
        if seed in own
    }
    made = hands.each(works)
    tuned = {
        label: Tuned(
            {seed: made[name][0] for seed, name in own.items()},
            {seed: entry for seed, name in own.items() if (entry := made[name][1]) is not None},
        )
        for label, own in names.items()
        if all(name in made for name in own.values())
    }
    if not tuned:
        lines = [f"    {name}: {why}" for name, why in hands.failed.items()]
        raise StageError("\n".join(["no candidate was trained with every seed:", *lines]))
    return tuned


def unmerged(candidate: Candidate) -> str:
    """How a candidate is served that is not folded into its base."""
    if candidate.FORMAT == "prompt":
        return "has no weights to merge and is served as its base and what stands before a prompt"
    return "is not merged and is served beside its base"


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
