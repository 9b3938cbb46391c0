"""What each stage is told, and the version of its algorithm.

A stage is `run(spec, paths, out_dir) -> facts`. Its spec holds only what changes its result (and
what `UNKEYED` names), so that the spec, the keys of its inputs and the hashes of outside files
make the key of its entry. Paths travel beside the spec and are never hashed: the same rows in
another place are the same.

Raise a stage's VERSION when its output for the same spec changes.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.frozen import Frozen
from schemas.manifest import FileFormat
from schemas.recipe import Data, Evaluate, Finish, Train
from schemas.report import Trial
from schemas.tasks import Task
from schemas.together import Candidate
from schemas.turbo import Turbo


class Spec(Frozen):
    """What every stage states of itself.

    RESUMES: a killed or starved attempt is gone on from.
    UNKEYED: fields, by dotted name, that change how the work goes and never what it makes.
    """

    STAGE: ClassVar[str]
    VERSION: ClassVar[int]
    RESUMES: ClassVar[bool] = False
    UNKEYED: ClassVar[tuple[str, ...]] = ()


class PrepareSpec(Spec):
    """paths: train, test (absent for a hold-out), retention (optional), base (its tokenizer).

    The entry: rows/{train,test,retention}.parquet, quarantine.parquet, data_report.json,
    tokens/{train,test,retention}.safetensors, test_rows.jsonl, labels.json (for tasks with labels).
    `tasks/core/tokens.py` states the token files. Of image files that rows name, the content is
    keyed too.
    """

    STAGE: ClassVar[str] = "prepare"
    VERSION: ClassVar[int] = 1

    task: Task
    data: Data = Field(description="With every `path` replaced by its file name.")


class InspectSpec(Spec):
    """paths: base. The entry: inspection.json, what each candidate would train.

    Builds every candidate on shapes alone, before any row is read, so that a target that matches
    no module or a rank that is too large is known at once.
    """

    STAGE: ClassVar[str] = "inspect"
    VERSION: ClassVar[int] = 2

    task: Task
    candidates: list[Candidate] = Field(description="Without their train overrides.")


class CostSpec(Spec):
    """paths: base (only its config.json is read), prepared; each absent where there is none.

    Of the schedule and of evaluation only what costs anything is told: no learning rate.

    The entry: plan.json (`schemas.cost.CostReport`), what each candidate would cost.
    """

    STAGE: ClassVar[str] = "cost"
    VERSION: ClassVar[int] = 10

    task: Task
    shape: dict[str, Any] | None = Field(description="In place of a base.")
    times: float = Field(1.0, description="So many times as large a base of the same kind.")
    candidates: list[Candidate]
    train: Train
    evaluate: Evaluate
    max_length: int = Field(description="Of the rows, where they are not prepared yet.")
    dtype: Literal["float32", "bfloat16"]


class TrainSpec(Spec):
    """paths: prepared, base. The entry: model/ (adapter, whole model, or the examples of
    a prompt), curve.json."""

    STAGE: ClassVar[str] = "train"
    VERSION: ClassVar[int] = 8
    RESUMES: ClassVar[bool] = True
    UNKEYED: ClassVar[tuple[str, ...]] = ("train.checkpoint_every_s",)

    task: Task
    candidate: Candidate = Field(description="Without its name and its train overrides.")
    train: Train = Field(description="With the candidate's overrides in place.")
    dtype: Literal["float32", "bfloat16"]


class EvaluateSpec(Spec):
    """paths: prepared, base, subject (a train or merge entry; absent for the base itself), heads
    (a turbo entry, where there is one).

    The entry: criteria.json (`schemas.report.CriteriaReport`; not for accuracy alone),
    predictions.jsonl, statistics.safetensors (`tasks/core/bootstrap.py`).
    """

    STAGE: ClassVar[str] = "evaluate"
    VERSION: ClassVar[int] = 5

    task: Task
    subject: Literal["base", "candidate", "finished"]
    evaluate: Evaluate
    train: Train = Field(description="The batch sizes for which a training step is measured.")
    dtype: Literal["float32", "bfloat16"]
    accuracy_only: bool = False


class CompareSpec(Spec):
    """paths: `<label>/<seed>` for every evaluation of a candidate.

    The entry: comparison.json (`schemas.report.Comparison`).
    """

    STAGE: ClassVar[str] = "compare"
    VERSION: ClassVar[int] = 1

    labels: list[str]
    seeds: list[int]
    metric: str
    more_is_better: bool
    resamples: int


class MergeSpec(Spec):
    """paths: base, trained, prepared (its labels.json; only for tasks with labels).

    The entry: model/, a whole transformers directory with tokenizer.
    """

    STAGE: ClassVar[str] = "merge"
    VERSION: ClassVar[int] = 2
    UNKEYED: ClassVar[tuple[str, ...]] = ("finish.turbo",)

    finish: Finish


class TurboSpec(Spec):
    """paths: base, prepared, subject (a train or merge entry).

    The entry: heads/ (`tasks/speculate/heads.py`), curve.json.
    """

    STAGE: ClassVar[str] = "turbo"
    VERSION: ClassVar[int] = 5
    RESUMES: ClassVar[bool] = True
    UNKEYED: ClassVar[tuple[str, ...]] = ("turbo.checkpoint_every_s",)

    task: Task
    turbo: Turbo
    max_new_tokens: int = Field(description="Longest continuation that is learned from.")
    dtype: Literal["float32", "bfloat16"]


class RegisterSpec(Spec):
    """paths: prepared, base, finished (merge or train entry), evaluated, page, and heads (a turbo
    entry) where there are any.

    The entry: registration.json (`schemas.report.Registration`). The registry itself is named
    by the environment variable MLFLOW_TRACKING_URI, which may hold a secret.
    """

    STAGE: ClassVar[str] = "register"
    VERSION: ClassVar[int] = 5

    task: Task
    name: str
    recipe_name: str
    base: dict[str, str | None] = Field(description="model (as written in the recipe), revision.")
    max_new_tokens: int
    tracking: str = Field(description="Hash of the tracking URI: another registry, another entry.")


class PageSpec(Spec):
    """paths: prepared, train:<label>…, evaluate:<label>…, evaluate:base, evaluate:finished,
    comparison, cost and larger (cost on a larger base) where they were told, and turbo where
    there are heads.

    The entry: report.html, one file that reads offline.
    """

    STAGE: ClassVar[str] = "report"
    VERSION: ClassVar[int] = 7

    recipe_name: str
    recipe_yaml: str
    labels: list[str]
    selected: str
    why: str = Field(description="The selection in words.")
    failed: dict[str, str] = Field(
        default_factory=dict, description="What of the candidates came to no figures, and why."
    )
    searched: dict[str, list[Trial]] = Field(
        default_factory=dict, description="Label: the learning rates that its search tried."
    )
    goal: str = Field(description="The figure that was maximised or minimised.")
    merges: bool = Field(description="Whether what is selected is folded into its base if it can.")


class Call(BaseModel):
    """One request to a stage, as JSON on its command line: `python -m tasks.train CALL.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    stage_version: int
    format: FileFormat
    spec: dict[str, Any]
    unkeyed: tuple[str, ...] = ()
    paths: dict[str, str]
    inputs: dict[str, str] = Field(default_factory=dict, description="Input name: entry key.")
    outside: dict[str, str] = Field(default_factory=dict, description="Name: content hash.")


def keyed(spec: dict[str, Any], unkeyed: tuple[str, ...]) -> dict[str, Any]:
    """The part of a spec that decides what a stage makes."""
    left = dict(spec)
    for name in unkeyed:
        first, _, rest = name.partition(".")
        if rest:
            left[first] = keyed(left[first], (rest,))
        else:
            left.pop(first, None)
    return left
