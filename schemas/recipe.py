"""The recipe: one YAML file, one pipeline run.

Every class is frozen and refuses unknown keys. Units are in the field names or descriptions.
The JSON Schema that editors use is generated from these classes (`schemas/recipe.schema.json`).
Reading YAML and turning errors into places and fixes is the work of `schemas/load.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from schemas.candidates import TrainOverrides
from schemas.frozen import NAME, Frozen
from schemas.tasks import Task
from schemas.together import Candidate
from schemas.turbo import Turbo

#: What a row is made of.
Column = Literal["messages", "prompt", "completion", "text", "label", "spans", "image"]

#: A bound on a metric, as written in `select.subject_to` and `register.gate`.
NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
BOUND = re.compile(rf"^\s*(<=|>=|<|>)\s*({NUMBER})\s*$")


class Base(Frozen):
    """The pretrained model that is adapted."""

    model: str = Field("", description="A directory (relative to the recipe file) or a hub id.")
    shape: dict[str, Any] | None = Field(
        None,
        description="For `peftflow plan` alone, in place of model: model_type and the fields of "
        "its transformers configuration.",
    )
    revision: str | None = Field(
        None, description="The commit of a hub id: 40 hexadecimal digits. Required for a hub id."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the frozen weights. auto: bfloat16 where the hardware multiplies it "
        "(AMX, CUDA), float32 elsewhere.",
    )

    @model_validator(mode="after")
    def _one_base(self) -> Base:
        if bool(self.model) == (self.shape is not None):
            raise ValueError("give exactly one of `model` and `shape`")
        return self


class Source(Frozen):
    """Rows: a JSONL, CSV or Parquet file, or a `datasets` hub id."""

    path: str = Field(description="A file (relative to the recipe file) or `hub:NAME[/CONFIG]`.")
    revision: str | None = Field(None, description="The commit of a hub data set.")
    split: str | None = Field(None, description="The split of a hub data set.")
    columns: dict[Column, str] = Field(
        default_factory=dict,
        description="Our name: the file's name, where they differ, e.g. {text: body, label: tag}.",
    )


class HoldOut(Frozen):
    """A share of the train rows, chosen by the hash of each row, so that it never drifts."""

    holdout: float = Field(gt=0, lt=0.5, description="Share of the train rows, e.g. 0.1.")
    after: float = Field(
        0,
        ge=0,
        lt=0.5,
        description="Share that is left out of both: what another hold-out of the file has taken.",
    )


def _test_kind(value: Any) -> str:
    """A test section with `holdout` is a share of train; any other names a source."""
    if isinstance(value, dict):
        return "share" if "holdout" in value else "source"
    return "share" if isinstance(value, HoldOut) else "source"


class Data(Frozen):
    """The rows to learn from, to measure on, and what happens to those that do not fit."""

    train: Source
    test: Annotated[
        Annotated[Source, Tag("source")] | Annotated[HoldOut, Tag("share")],
        Discriminator(_test_kind),
    ]
    retention: Source | None = Field(
        None,
        description="General text, one `text` a row, to measure what was forgotten; for seq2seq "
        "rows like those of train, of another task.",
    )
    max_length: int = Field(
        512,
        ge=8,
        description="Tokens a row may have, prompt and answer; for seq2seq each by itself.",
    )
    on_overflow: Literal["refuse", "truncate"] = Field(
        "refuse",
        description="A row longer than max_length: refuse it, or cut the prompt from the left "
        "(classification, seq2seq: from the right). An answer is never cut.",
    )
    template: Literal["auto", "chat", "plain"] = Field(
        "auto",
        description="How prompt and completion become text. chat: the model's own chat template; "
        "plain: prompt followed by completion; auto: chat where the tokenizer has a template.",
    )
    test_rows: int | None = Field(
        None, ge=1, description="Measure on this many test rows, chosen by hash. null: all."
    )


class Train(Frozen):
    """The training budget and schedule, the same for every candidate unless it overrides."""

    epochs: float = Field(3, gt=0)
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps; null: by epochs.")
    learning_rate: float = Field(2e-4, gt=0)
    batch_tokens: int = Field(4096, ge=1, description="Tokens an optimiser step, padding excluded.")
    micro_batch_tokens: int | None = Field(
        None, ge=1, description="Padded tokens in one forward pass; bounds memory, not the result."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps.")
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    checkpoint_every_s: float = Field(60.0, ge=0, description="Seconds; 0: after every step.")
    seed: int = Field(0, ge=0, lt=2**31)

    def for_candidate(self, overrides: TrainOverrides) -> Train:
        """This schedule with a candidate's own values in place."""
        return self.model_copy(update=overrides.model_dump(exclude_none=True))


class Evaluate(Frozen):
    """How the five criteria are measured."""

    max_new_tokens: int = Field(128, ge=1, description="Longest answer that is generated.")
    generate_rows: int | None = Field(
        None, ge=1, description="Generate answers for this many test rows. null: all of them."
    )
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 8], min_length=1
    )
    prompt_tokens: Annotated[
        Annotated[int, Field(ge=1), Tag("one")]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1), Tag("several")],
        Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
    ] = Field(
        64,
        description="Prompt length for the latency figures, or several, e.g. [64, 16, 256]: the "
        "figures of the first have the plain names, those of 256 end in _p256.",
    )
    repeats: int = Field(20, ge=3, description="Timed repeats of each latency figure.")
    bootstrap: int = Field(1000, ge=100, description="Resamples for the 95 % intervals.")

    @property
    def prompt_lengths(self) -> list[int]:
        """Each of `prompt_tokens` once, in the recipe's order."""
        given = self.prompt_tokens
        return list(dict.fromkeys(given if isinstance(given, list) else [given]))


def checked_bound(value: Any) -> Any:
    """A bound as given, or a ValueError that says how to write one."""
    text = str(value)
    if isinstance(value, str) and BOUND.match(text):
        return value
    limit = text if re.fullmatch(NUMBER, text) else "0.9"
    raise ValueError(f'is no bound; write e.g. ">= {limit}" or "<= {limit}"')


Bound = Annotated[str, BeforeValidator(checked_bound)]


class RateRange(Frozen):
    """Learning rates between two, on a logarithmic scale."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)

    @model_validator(mode="after")
    def _rises(self) -> RateRange:
        if self.low >= self.high:
            raise ValueError("`low` must be below `high`")
        return self


def _rates_kind(value: Any) -> str:
    """Rates are listed, or between two ends."""
    return "range" if isinstance(value, dict | RateRange) else "list"


Rate = Annotated[float, Field(gt=0)]
Rates = Annotated[list[Rate], Field(min_length=1)]


class Search(Frozen):
    """The learning rate of each candidate, searched on rows that are held out of train.

    Default rates decide comparisons of methods, so each candidate gets the same number of trials
    of the same length. One with a `learning_rate` of its own keeps it.
    """

    learning_rate: Annotated[
        Annotated[Rates, Tag("list")] | Annotated[RateRange, Tag("range")],
        Discriminator(_rates_kind),
    ] = Field(description="The rates to try, or {low: …, high: …}.")
    trials: int = Field(
        4, ge=1, description="For each candidate; a list of fewer rates is tried whole."
    )
    share: float = Field(
        1.0, gt=0, le=1, description="Length of a trial, as a share of the candidate's training."
    )
    holdout: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the train rows that trials are measured on."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of the sampler, and of each trial.")


class Select(Frozen):
    """Which candidate goes on to be finished."""

    maximize: str | None = Field(None, description="A figure of the report, e.g. accuracy.")
    minimize: str | None = Field(None, description="A figure of the report, e.g. perplexity.")
    prefer: str | None = Field(
        None,
        description="Of those that are not told apart from the best, the one with the least of "
        "this figure, e.g. shipped_bytes. null: the best, however narrowly.",
    )
    subject_to: dict[str, Bound] = Field(
        default_factory=dict, description='Bounds, e.g. {adapter_mib: "<= 10"}.'
    )

    @model_validator(mode="after")
    def _one_goal(self) -> Select:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("give exactly one of `maximize` and `minimize`")
        return self


class Finish(Frozen):
    """What becomes of the selected candidate before it is registered."""

    merge: bool = Field(True, description="Fold the adapter into the base's weights.")
    turbo: Turbo | None = Field(
        None, description="Heads that draft tokens ahead, for causal-lm: the same text, faster."
    )


class Register(Frozen):
    """The MLflow registered model, and what a version must show before it is promoted."""

    name: str = Field(pattern=NAME)
    gate: dict[str, Bound] = Field(
        default_factory=dict, description='Bounds on the finished model, e.g. {accuracy: ">= 0.9"}.'
    )
    promote: bool = Field(False, description="Give a version that passes the gate `champion`.")


class Recipe(Frozen):
    """One pipeline run, from rows to a promoted model."""

    name: str = Field(pattern=NAME)
    task: Task
    base: Base
    data: Data
    candidates: list[Candidate] = Field(min_length=1)
    train: Train = Field(default_factory=Train)
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = Field(
        None,
        min_length=1,
        description="Train every candidate once for each; figures are means, and the first seed's "
        "model is the one that goes on. null: train.seed alone.",
    )
    search: Search | None = Field(None, description="null: the rates as they are given.")
    evaluate: Evaluate = Field(default_factory=Evaluate)
    select: Select
    finish: Finish = Field(default_factory=Finish)
    register_: Register = Field(alias="register")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def all_seeds(self) -> list[int]:
        return self.seeds or [self.train.seed]

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("holds a seed twice: it would train the same model again")
        return value

    @model_validator(mode="after")
    def _one_place_for_seeds(self) -> Recipe:
        if self.seeds is not None and "seed" in self.train.model_fields_set:
            raise ValueError("give `seeds` or `train.seed`, not both")
        return self

    @field_validator("candidates")
    @classmethod
    def _names_differ(cls, value: list[Any]) -> list[Any]:
        labels = [candidate.label for candidate in value]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"candidates share the name {', '.join(twice)}: give each a `name`")
        if taken := sorted({"base", "finished"} & set(labels)):
            raise ValueError(f"the name {taken[0]!r} means something else in reports: take another")
        return value


def holds(bound: str, value: float) -> bool:
    """Whether `value` keeps a bound such as ">= 0.9". A NaN keeps none."""
    match = BOUND.match(bound)
    assert match, bound
    limit = float(match[2])
    sign = match[1]
    if sign == "<=":
        return value <= limit
    if sign == ">=":
        return value >= limit
    return value < limit if sign == "<" else value > limit
