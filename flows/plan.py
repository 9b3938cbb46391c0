"""Two pairs of hands that make nothing: one looks whether all is done, one lists what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flows.calls import Calls, Made, Step
from flows.home import Home
from flows.story import NotYetError, Outcome, story
from schemas.report import GateVerdict, Registration
from tasks.core.store import Entry, Store, key_of


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
        self._store = Store(home.store)
        self._is_promoted, self._asked = is_promoted, asked
        self.found: list[Found] = []

    def make(self, step: Step) -> Entry:
        entry = self._store.find(step.call)
        if entry is None:
            raise NotYetError(step.title)
        self.found.append(Found(step, entry.key, True, entry.manifest.provenance.seconds))
        return entry

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

    def make(self, step: Step) -> Made:
        store, key = Store(self.home.store), key_of(step.call)
        entry = store.find(step.call)
        if entry is not None:
            self.steps.append(Found(step, key, True, entry.manifest.provenance.seconds))
            return entry
        self.steps.append(Found(step, key, False))
        return Pending(key, store.path(step.call.stage, key))

    def promote(self, registration: Registration, verdict: GateVerdict) -> bool:
        return False


def already_done(
    calls: Calls, is_promoted: Callable[[Registration], bool]
) -> tuple[Outcome, list[Found]] | None:
    """The outcome of a pipeline whose every entry exists, with its steps; else None."""
    hands = Looking(calls.home, is_promoted, calls.recipe.register_.promote)
    try:
        return story(calls, hands), hands.found
    except NotYetError:
        return None


def planned(calls: Calls) -> tuple[list[Found], list[str]]:
    """The steps that can be told beforehand, and the names of those that follow a selection."""
    hands = Listing(calls.home)
    try:
        story(calls, hands)
    except NotYetError:
        pass
    else:
        return hands.steps, []
    known = {found.step.title for found in hands.steps}
    after = ["evaluate finished", "report", "register"]
    if calls.recipe.finish.merge:
        after.insert(0, "merge")
    return hands.steps, [name for name in after if name not in known]
