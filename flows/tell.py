"""How a run ended, put into its record."""

from __future__ import annotations

import shutil
from dataclasses import asdict

from flows.home import Home
from flows.records import RunRecord, Subject, Told, reports_path
from flows.standing import aliases
from flows.story import Outcome
from schemas.errors import DiskFullError, UserError
from tasks.core.apart import best_of, told_apart


def finish(record: RunRecord, outcome: Outcome, home: Home) -> None:
    """Fill in what the story ended with, and copy the HTML report to the home's `reports/`."""
    page = reports_path(home, record.run_id)
    shutil.copyfile(outcome.page, page)
    reports = outcome.reports
    record.report = str(page)
    record.base = Subject.of("base", reports["base"])
    record.finished = Subject.of("finished", reports["finished"])
    record.candidates = [Subject.of(label, reports[label]) for label in outcome.trained]
    comparison = outcome.comparison
    record.seeds, record.best = comparison.seeds, best_of(comparison)
    others = [label for label in comparison.candidates if label != record.best]
    record.against_best = [
        Told(**asdict(test), apart=test.apart)
        for test in told_apart(comparison, record.best, others)
    ]
    record.searched = {label: found.told for label, found in outcome.searched.items()}
    record.warnings += [
        f"search: the best learning rate of {label}, {found.best.learning_rate:.3g}, is the "
        f"{'lowest' if found.best.learning_rate == found.lowest else 'highest'} that was tried: "
        "a better one may lie beyond"
        for label, found in outcome.searched.items()
        if found.at_the_edge
    ]
    choice = outcome.choice
    record.selected, record.why, record.goal = choice.label, choice.why, choice.goal
    record.registered, record.gate = outcome.registration, outcome.verdict
    record.promoted = outcome.promoted
    record.aliases = aliases(home, outcome.registration)
    record.state = "done" if outcome.verdict.passed else "refused"


def is_users(error: BaseException) -> bool:
    """Whether it is for the user to put right: the input, or a disk that stayed full."""
    return isinstance(error, UserError | DiskFullError)


def problems_of(error: BaseException) -> list[dict[str, str]]:
    """An exception as a list of problems, each with place, found and fix."""
    if isinstance(error, UserError):
        return [problem.as_dict() for problem in error.problems]
    if isinstance(error, KeyboardInterrupt):
        return [{"place": "", "found": "interrupted", "fix": "run again: it goes on from here"}]
    fix = error.FIX if isinstance(error, DiskFullError) else ""
    return [{"place": "", "found": str(error) or type(error).__name__, "fix": fix}]
