"""The reports: what was found in the data, and the five criteria of one subject.

Every figure names its unit here and, in `how`, the way it was measured. The flat names of
`CriteriaReport.figures()` are those of `select`, of the gate and of MLflow's metrics.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from schemas.tasks import TASKS, is_encoder_decoder, is_labelled


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LengthHistogram(Strict):
    """Row lengths in tokens. counts[i] rows have edges[i] <= length < edges[i + 1]."""

    edges: list[int]
    counts: list[int]


class SplitReport(Strict):
    """What became of the rows of one split. rows_in == rows_kept + sum(refused.values())."""

    path: str
    rows_in: int
    rows_kept: int
    refused: dict[str, int] = Field(
        description="First reason: rows. Every reason of a row stands in the quarantine."
    )
    truncated: int = Field(description="Rows kept whose prompt was cut to max_length.")
    label_less: int = Field(description="Rows whose answer has no token left; always refused.")
    tokens: int
    answer_tokens: int
    lengths: LengthHistogram
    spans: int | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="token-classification: spans of the rows kept.",
    )
    spans_cut: int | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Of these, spans that lie, or end, past max_length in a truncated row.",
    )


class DataReport(Strict):
    """The data report of one prepared data set."""

    task: str
    template: Literal["chat", "plain", "none"]
    max_length: int
    splits: dict[str, SplitReport]
    labels: dict[str, int] = Field(
        default_factory=dict, description="Label: rows (or spans) in train."
    )


class Interval(Strict):
    """A figure with its 95 % interval; of a metric, a percentile bootstrap over rows."""

    value: float
    low: float
    high: float


class Storage(Strict):
    shipped_bytes: int = Field(description="Bytes that must be shipped for this task.")
    ten_tasks_bytes: int | None = Field(
        None, description="Bytes of ten such tasks: on one base, or ten whole models."
    )
    trainable_parameters: int
    trainable_share: float = Field(description="Of the base's parameters, 0 to 1.")


class Memory(Strict):
    """MiB. CPU: peak resident set of the isolated process minus its floor before loading."""

    train_peak_mib: float | None
    train_weights_mib: float | None = Field(None, description="All of the model's, as held.")
    train_gradients_mib: float | None = Field(None, description="Of the weights that learn.")
    train_optimiser_mib: float | None = Field(None, description="Its moments.")
    train_activations_mib: float | None = Field(
        None, description="What autograd keeps of the run's largest micro-batch."
    )
    train_rest_mib: float | None = Field(
        None, description="The peak without these parts, which are never all there at once."
    )
    generate_peak_mib: float
    base_generate_peak_mib: float


class Computation(Strict):
    forward_flops_per_token: float
    backward_flops_per_token: float | None
    train_flops_per_token: float | None = Field(
        None, description="Forward and backward, as the run was trained: the train stage's count."
    )
    step_time_s: float | None = Field(description="Median of the optimiser steps.")
    train_tokens_per_s: float | None
    flops_ratio_to_full: float | None = Field(description="Forward + backward, of full tuning's.")
    step_time_ratio_to_full: float | None


#: The figure of what was forgotten, beside a task's metrics.
RETENTION = "retention_change"


class Accuracy(Strict):
    """The task's metrics on the held-out rows, and what was forgotten."""

    metrics: dict[str, Interval] = Field(
        description="sequence- and image-classification: accuracy, macro_f1, loss. causal-lm: "
        "exact_match, field_f1 (where answers are JSON objects), perplexity, loss (nats per answer "
        "token). seq2seq: these and rouge_l. token-classification: entity_f1, entity_precision, "
        "entity_recall, token_accuracy, loss (nats per token)."
    )
    rows: int
    retention_loss: float | None = Field(description="Nats per token of general text.")
    retention_loss_base: float | None
    retention_change: Interval | None = Field(
        description="retention_loss minus the base's, on the same texts."
    )

    def intervals(self) -> dict[str, Interval]:
        """The metrics, and retention where it was measured."""
        change = self.retention_change
        return self.metrics | ({} if change is None else {RETENTION: change})


class Latency(Strict):
    """One batch size and prompt length. ms; ratios are to the base's, turn by turn beside it:
    their median and its 95 % interval over the turns."""

    batch_size: int
    prompt_tokens: int | None = Field(None, description="As the recipe asks for.")
    merged: bool
    prefill_p50_ms: float
    prefill_p95_ms: float
    token_p50_ms: float | None = Field(description="None for classification: nothing is decoded.")
    token_p95_ms: float | None
    prefill_ratio: Interval
    token_ratio: Interval | None


class Seeded(Interval):
    """A metric over several seeds: `value` is their mean, and the interval is of both rows and
    seeds drawn anew."""

    seeds: list[float] = Field(description="The metric of each seed.")


class Trial(Strict):
    """One learning rate of a search. value: the metric on the rows held out for it; None where
    the training diverged. chosen: the candidate was trained at this rate."""

    learning_rate: float
    value: float | None
    chosen: bool = False


class Pair(Strict):
    """Two candidates on the same rows and seeds."""

    first: str
    second: str
    difference: float = Field(description="The first one's metric minus the second one's.")
    low: float
    high: float
    p: float = Field(description="Two-sided, for this pair alone.")
    test: Literal["McNemar", "paired bootstrap"]


class Comparison(Strict):
    """The candidates' metrics over all seeds, and a paired test of every two of them.

    `tasks/core/apart.py` reads from it who is told apart from whom.
    """

    metric: str
    more_is_better: bool
    seeds: list[int]
    candidates: dict[str, dict[str, Seeded]] = Field(description="Label: metric: its figures.")
    pairs: list[Pair]
    how: str

    def over_seeds(self, label: str, report: CriteriaReport) -> CriteriaReport:
        """A candidate's report (of its first seed) with the metrics and retention of all seeds."""
        found = {
            name: Interval.model_validate(seeded.model_dump(exclude={"seeds"}))
            for name, seeded in self.candidates[label].items()
        }
        before = report.accuracy
        update: dict[str, Any] = {"metrics": {name: found[name] for name in before.metrics}}
        if before.retention_loss_base is not None:
            change = found[RETENTION]
            update |= {
                "retention_change": change,
                "retention_loss": before.retention_loss_base + change.value,
            }
        return report.model_copy(update={"accuracy": before.model_copy(update=update)})


class Swapping(Strict):
    """Ten adapters of the subject's shapes on one loaded base."""

    swap_ms: float = Field(description="Median of going from one to the next.")
    ten_adapters_mib: float = Field(description="Their tensors, beside the base's.")
    equal: bool = Field(description="Coming back gives the logits of a fresh load, bit for bit.")


class Speed(Strict):
    """How fast answers are written at one batch size. Tokens a second, of all rows together;
    ratios are of the same rows in the same turn: their median and its 95 % interval."""

    batch_size: int
    generate_tokens_per_s: float = Field(description="transformers' own greedy generate().")
    plain_tokens_per_s: float = Field(description="The loop that verifies drafts, without any.")
    heads_tokens_per_s: float
    speedup: Interval = Field(description="With heads, over generate().")
    speculation: Interval = Field(description="With heads, over the same loop without.")
    tokens_per_pass: float = Field(description="That a row's pass of the model brought.")


class Speculation(Strict):
    """What Turbo heads do for the finished model."""

    heads: int
    rank: int
    state: int
    parameters: int
    medusa_parameters: int = Field(description="Of Medusa-1 with as many heads on this base.")
    stored_bytes: int
    speeds: list[Speed]
    accepted: list[float] = Field(
        description="Of the passes at the first batch size that had a draft so deep, the share in "
        "which it was right, from depth 1."
    )
    rows: int = Field(description="Test rows that were answered.")
    alike: int = Field(description="Of these, those with the same answer as generate() gives.")


class Example(Strict):
    prompt: str
    expected: str
    got: str
    right: bool
    image: str | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Of an image, as the base reads it: a small PNG as a data URI.",
    )


class CriteriaReport(Strict):
    """The five criteria of one subject: the base, a candidate, or the finished model."""

    subject: Literal["base", "candidate", "finished"]
    method: str
    storage: Storage
    memory: Memory
    computation: Computation
    accuracy: Accuracy
    inference_overhead: list[Latency]
    swapping: Swapping | None = Field(None, description="None for what is no adapter.")
    speculation: Speculation | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="None for what has no Turbo heads.",
    )
    examples: list[Example]
    device: str = Field(description="cpu, or the GPU's name.")
    dtype: str
    how: dict[str, str] = Field(description="Criterion: how it was measured, in words.")

    def figures(self) -> dict[str, float]:
        """Flat name: value, for bounds, tables and MLflow. Figures that do not exist are absent."""
        computation = self.computation.model_dump()
        flat: dict[str, float | None] = {
            "shipped_bytes": self.storage.shipped_bytes,
            "ten_tasks_bytes": self.storage.ten_tasks_bytes,
            "adapter_mib": self.storage.shipped_bytes / 2**20,
            "trainable_parameters": self.storage.trainable_parameters,
            "trainable_share": self.storage.trainable_share,
            **self.memory.model_dump(),
            **computation,
            "retention_loss": self.accuracy.retention_loss,
        }
        if self.speculation is not None:
            flat["turbo_parameters"] = self.speculation.parameters
            for speed in self.speculation.speeds:
                flat[f"tokens_per_pass_b{speed.batch_size}"] = speed.tokens_per_pass
                flat[f"tokens_per_s_b{speed.batch_size}"] = speed.heads_tokens_per_s
        flat |= {name: interval.value for name, interval in self.intervals().items()}
        if self.swapping is not None:
            flat |= self.swapping.model_dump(exclude={"equal"})
        for row in self.inference_overhead:
            times = row.model_dump(exclude={*LATENCY_PLACE, *LATENCY_RATIOS})
            flat |= {f"{figure}_{self.tag(row)}": value for figure, value in times.items()}
        return {name: float(value) for name, value in flat.items() if value is not None}

    def intervals(self) -> dict[str, Interval]:
        """Those of `figures()` that have an interval: metrics, retention, ratios of latencies."""
        ratios = {
            f"{figure}_{self.tag(row)}": getattr(row, figure)
            for row in self.inference_overhead
            for figure in LATENCY_RATIOS
        }
        timed = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        if self.speculation is not None:
            for speed in self.speculation.speeds:
                timed[f"speedup_b{speed.batch_size}"] = speed.speedup
                timed[f"speculation_b{speed.batch_size}"] = speed.speculation
        return self.accuracy.intervals() | timed

    def tag(self, row: Latency) -> str:
        """What the names of a latency's figures end in."""
        first = self.inference_overhead[0].prompt_tokens
        length = row.prompt_tokens if row.prompt_tokens != first else None
        return latency_tag(row.batch_size, length, row.merged)


#: The fields of `Latency` that say what was timed, and are no figures.
LATENCY_PLACE = ("batch_size", "prompt_tokens", "merged")
#: Those that are ratios to the base, with an interval.
LATENCY_RATIOS = ("prefill_ratio", "token_ratio")


def latency_tag(batch_size: int, prompt_tokens: int | None, merged: bool) -> str:
    """`b1`, `b8_p256_merged`; prompt_tokens: None for the first of the recipe's lengths."""
    length = "" if prompt_tokens is None else f"_p{prompt_tokens}"
    return f"b{batch_size}{length}" + ("_merged" if merged else "")


#: The metrics of each task, and whether more is better.
TASK_METRICS: dict[str, dict[str, bool]] = {name: task.metrics for name, task in TASKS.items()}


def figure_names(task: str, batch_sizes: list[int], prompt_lengths: list[int]) -> list[str]:
    """The names that `CriteriaReport.figures()` may have for a task: what a bound can speak of."""
    names = [*TASK_METRICS[task], "shipped_bytes", "ten_tasks_bytes", "adapter_mib"]
    names += ["trainable_parameters", "trainable_share"]
    names += [*Memory.model_fields, *Computation.model_fields]
    names += ["retention_loss", RETENTION, "swap_ms", "ten_adapters_mib"]
    timed = [name for name in Latency.model_fields if name not in LATENCY_PLACE]
    if is_labelled(task):
        timed = [name for name in timed if not name.startswith("token_")]
    if not is_labelled(task) and not is_encoder_decoder(task):
        fast = ("tokens_per_pass", "tokens_per_s", "speedup", "speculation")
        names += ["turbo_parameters"]
        names += [f"{figure}_b{size}" for size, figure in product(batch_sizes, fast)]
    lengths = [None, *prompt_lengths[1:]]
    for size, length, figure in product(batch_sizes, lengths, timed):
        names += [f"{figure}_{latency_tag(size, length, merged)}" for merged in (False, True)]
    return names


class CurvePoint(Strict):
    """One optimiser step of a training curve (train entry, curve.json is a list of these)."""

    step: int
    epoch: float
    loss: float = Field(description="Nats per answer token, or per row for classification.")
    learning_rate: float
    grad_norm: float
    tokens: int = Field(description="Tokens seen so far, padding excluded.")
    step_time_s: float


class Registration(Strict):
    """What came of registering: the version, and the proof that it loads as it was trained."""

    name: str
    version: str
    run_id: str
    model_uri: str
    max_logit_difference: float = Field(description="Reloaded in a fresh process, to the entry's.")
    tolerance: float


class GateCheck(Strict):
    figure: str
    bound: str
    value: float | None
    passed: bool
    note: str = Field("", description="Why there is no value, in words.")


class GateVerdict(Strict):
    """Each bound of the gate with the figure it met."""

    passed: bool
    checks: list[GateCheck]


class LedgerEntry(Strict):
    """One line of the append-only ledger of promotions."""

    when: str = Field(description="UTC, ISO 8601.")
    who: str
    action: Literal["promote", "rollback"] = "promote"
    name: str
    alias: str
    from_version: str | None
    to_version: str
    why: str
