"""The two ways in which a run can end badly, and how each is told to a person.

`UserError` is for what a user wrote or gave; the command line prints it and exits with 2.
`StageError` is for what went wrong while working; the command line exits with 1, but with 2
where the disk is full, since its user alone can free some.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the input, with its place and its cure.

    place: where it is, e.g. `recipe.yaml:12 candidates[1].rank` or `train.jsonl:48`.
    found: what stands there.
    fix: what to write instead.
    """

    place: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.place}: {self.found}\n    fix: {self.fix}"

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


class UserError(ValueError):
    """Input that cannot be worked with: every problem at once, never the first alone."""

    def __init__(self, problems: Problem | list[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else problems
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def at(cls, place: object, found: str, fix: str) -> UserError:
        return cls(Problem(str(place), found, fix))


class StageError(RuntimeError):
    """A stage that could not finish. Terminal: trying again gives the same answer."""


class RetryableError(StageError):
    """A stage that could not finish now and may later, such as a server that is away."""


class DiskFullError(RetryableError):
    """No space is left. Retried as others are; what stays full is the user's to put right."""

    FIX = (
        "Free some space and run again: finished stages are kept, and training goes on from its "
        "last checkpoint."
    )


class DivergedError(StageError):
    """Training that left for infinity or went dead. The same recipe would do so again."""


#: What a stage's process can end with, by the name that it tells its parent.
STAGE_ERRORS = {
    kind.__name__: kind for kind in (StageError, RetryableError, DiskFullError, DivergedError)
}
