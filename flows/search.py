"""The search for a candidate's learning rate: the same number of equally long trials for each.

Optuna proposes, the stages train and measure, and every trial is an entry of the store. Its
samplers are seeded, so that asking again proposes the same rates and finds what they gave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flows.calls import Calls, Made, Step, figures_of
from schemas.errors import DivergedError, StageError, UserError
from schemas.recipe import RateRange, Search
from schemas.report import Trial
from schemas.together import Candidate

if TYPE_CHECKING:
    import optuna

RATE = "learning_rate"
#: Trials that are drawn before Optuna's sampler (TPE, Bergstra et al. 2011) learns from them.
RANDOM = 4


@dataclass(frozen=True)
class Searched:
    """The trials of one candidate in the order of their asking."""

    metric: str
    more_is_better: bool
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """Of equals, the lower rate: it is the safer one.

        Raises:
            StageError: all diverged.
        """
        sign = -1 if self.more_is_better else 1
        known = [
            (sign * trial.value, trial.learning_rate, trial)
            for trial in self.trials
            if trial.value is not None
        ]
        if not known:
            rates = ", ".join(f"{trial.learning_rate:.3g}" for trial in self.trials)
            raise StageError(
                f"search: training diverged at every rate that was tried ({rates}); "
                "add lower ones to search.learning_rate"
            )
        return min(known)[2]

    @property
    def told(self) -> list[Trial]:
        """The trials, that of the best rate marked."""
        best = self.best.learning_rate
        return [
            trial.model_copy(update={"chosen": trial.learning_rate == best})
            for trial in self.trials
        ]

    @property
    def lowest(self) -> float:
        return min(trial.learning_rate for trial in self.trials)

    @property
    def at_the_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of several: better ones may lie beyond."""
        rates = [trial.learning_rate for trial in self.trials]
        return len(set(rates)) > 1 and self.best.learning_rate in (min(rates), max(rates))


def require_metric(metric: str, figures: dict[str, float], rows: str) -> None:
    """Raise a UserError where rows cannot be measured by that metric."""
    if metric not in figures:
        why = ": no expected answer that is generated is a JSON object" * (metric == "field_f1")
        raise UserError.at(
            "recipe select",
            f"{metric} is not measured on {rows}{why}",
            "choose another metric of the task, e.g. loss",
        )


class Making(Protocol):
    def make(self, step: Step) -> Made: ...


def wants_search(candidate: Candidate, search: Search | None) -> bool:
    """A rate that the recipe gives is kept, and what is not trained has none."""
    return search is not None and candidate.TRAINS and candidate.train.learning_rate is None


def search_rate(calls: Calls, hands: Making, candidate: Candidate, rows: Made) -> Searched:
    """Try rates for one candidate. rows: prepared with a hold-out.

    Raises:
        NotYetError: a trial is still to be made.
    """
    search = calls.recipe.search
    assert search is not None
    metric, more = calls.metric, calls.more_is_better
    study, count = study_of(search, more)
    trials: list[Trial] = []
    for _ in range(count):
        asked = study.ask()
        rate = propose(asked, search)
        value = try_rate(calls, hands, calls.trial(candidate, rows, search, rate), rows)
        worst = -math.inf if more else math.inf
        study.tell(asked, worst if value is None else value)
        trials.append(Trial(learning_rate=rate, value=value))
    return Searched(metric, more, trials)


def try_rate(calls: Calls, hands: Making, step: Step, rows: Made) -> float | None:
    """The metric that a trial comes to, or None: it diverged, or what it learned is no number.

    Raises:
        UserError: the rows that are held out have no such metric.
    """
    try:
        trained = hands.make(step)
        found = figures_of(hands.make(calls.score(step, rows, trained)))
    except DivergedError:
        return None
    require_metric(calls.metric, found, "the train rows held out for the search")
    return found[calls.metric]


def study_of(search: Search, more: bool) -> tuple[optuna.Study, int]:
    """A study in memory, and how many trials it takes."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize" if more else "minimize",
        sampler=optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=RANDOM),
    )
    listed = listed_rates(search)
    for rate in listed:
        study.enqueue_trial({RATE: rate})
    return study, trials_of(search)


def trials_of(search: Search) -> int:
    """How many trials each candidate has."""
    return len(listed_rates(search)) or search.trials


def listed_rates(search: Search) -> list[float]:
    """The rates of a list that are tried: all, or as many as there are trials, evenly spread."""
    if isinstance(search.learning_rate, RateRange):
        return []
    rates = sorted(set(search.learning_rate))
    count = min(search.trials, len(rates))
    if count == 1:
        return [rates[len(rates) // 2]]
    return [rates[round(at * (len(rates) - 1) / (count - 1))] for at in range(count)]


def propose(asked: optuna.Trial, search: Search) -> float:
    """A rate; a drawn one to three digits, so that what is printed is what was tried."""
    rates = search.learning_rate
    if isinstance(rates, RateRange):
        return float(f"{asked.suggest_float(RATE, rates.low, rates.high, log=True):.3g}")
    return asked.suggest_float(RATE, min(rates), max(rates))
