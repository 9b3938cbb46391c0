"""Two pairs of hands that make nothing: one looks whether all is done, one lists what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from flows.calls import Calls, Made, NotYetError, Step
from flows.home import Home
from flows.remember import Diverged
from flows.search import trials_of, wants_search
from flows.story import Outcome, story
from schemas.errors import DivergedError, StageError
from schemas.report import GateVerdict, Registration
from tasks.core.store import Entry, Store, key_of

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A step with its key and whether its entry was there. seconds: what making it took."""

    step: Step
    key: str
    cached: bool
    seconds: float | None = None


@dataclass(frozen=True)
class Pending:
    """An entry that is still to be made, where it will be."""

    key: str
    path: Path


class Looking:
    """Hands that only find: the first entry that is missing ends the story."""

    def __init__(self, home: Home, is_promoted: Callable[[Registration], bool], asked: bool):
        self._store, self._diverged = Store(home.store), Diverged(home.diverged)
        self.failed: dict[str, str] = {}
        self._is_promoted, self._asked = is_promoted, asked
        self.found: list[Found] = []

    def make(self, step: Step) -> Entry:
        entry = self._store.find(step.call)
        if entry is None:
            self._diverged.check(key_of(step.call))
            raise NotYetError(step.title)
        self.found.append(Found(step, entry.key, True, entry.manifest.provenance.seconds))
        return entry

    def each(self, works: Mapping[str, Callable[[], T]], *, alone: bool = False) -> dict[str, T]:
        return {label: work() for label, work in works.items()}

    def warn(self, words: str) -> None:
        """What is missing is looked for again where it is needed."""

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        if not (self._asked and verdict.passed):
            return False
        if not self._is_promoted(registration):
            raise NotYetError("promote")
        return True


@dataclass
class Listing:
    """Hands that name what they would make."""

    home: Home
    steps: list[Found] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def make(self, step: Step) -> Made:
        store, key = Store(self.home.store), key_of(step.call)
        entry = store.find(step.call)
        if entry is not None:
            self.steps.append(Found(step, key, True, entry.manifest.provenance.seconds))
            return entry
        Diverged(self.home.diverged).check(key)
        self.steps.append(Found(step, key, False))
        return Pending(key, store.path(step.call.stage, key))

    def each(self, works: Mapping[str, Callable[[], T]], *, alone: bool = False) -> dict[str, T]:
        """What cannot be told yet is left out: a rate that is still searched."""
        known: dict[str, T] = {}
        for label, work in works.items():
            with suppress(StageError):
                known[label] = work()
        return known

    def warn(self, words: str) -> None:
        """A plan says what its steps are, and no more."""

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        return False


def already_done(
    calls: Calls, is_promoted: Callable[[Registration], bool]
) -> tuple[Outcome, list[Found]] | None:
    """The outcome of a pipeline whose every entry exists, with its steps; else None."""
    hands = Looking(calls.home, is_promoted, calls.recipe.register_.promote)
    try:
        return story(calls, hands), hands.found
    except (NotYetError, DivergedError):
        return None


def planned(calls: Calls) -> tuple[list[Found], dict[str, str]]:
    """The steps that can be told beforehand; and of those that cannot their names, with what each
    one waits for."""
    hands = Listing(calls.home)
    try:
        story(calls, hands)
    except StageError:
        pass
    else:
        return hands.steps, {}
    known = {found.step.title for found in hands.steps}
    after = ["compare", "evaluate finished", "report", "register"]
    if calls.recipe.finish.merge:
        after.insert(1, "merge")
    if calls.recipe.finish.turbo or any(one.heads() for one in calls.recipe.candidates):
        after.insert(-3, "turbo")
    later = dict.fromkeys([name for name in after if name not in known], "after the selection")
    if calls.unread is not None:
        labels = [candidate.label for candidate in calls.recipe.candidates]
        trained = [f"train {label}" for label in labels]
        evaluated = [f"evaluate {label}" for label in ["base", *labels]]
        return hands.steps, dict.fromkeys([*trained, *evaluated], calls.unread) | later
    return hands.steps, trials_left(calls, hands.steps) | later


def trials_left(calls: Calls, steps: list[Found]) -> dict[str, str]:
    """The trials of a search that are not among the steps, as each rate is chosen by those before,
    and the training that follows them."""
    search = calls.recipe.search
    left: dict[str, str] = {}
    for candidate in calls.recipe.candidates:
        if search is None or not wants_search(candidate, search):
            continue
        own = [found.step for found in steps if found.step.label == candidate.label]
        own = [step for step in own if step.call.stage == "train"]
        tried = sum(step.trial is not None for step in own)
        if tried < len(own):  # it is trained at the rate that was found
            continue
        if more := trials_of(search) - tried:
            trials = "1 more trial" if more == 1 else f"{more} more trials"
            left[f"{candidate.label}: {trials}"] = "after the first"
        left[f"train {candidate.label}"] = "after its trials"
    return left
