"""Criterion 4, accuracy and retention: what was learned, and what was forgotten.

Shapes: N test rows, G of them with a generated answer, C classes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import DivergedError, StageError
from schemas.recipe import Evaluate
from schemas.report import RETENTION, Accuracy, Example, Interval
from schemas.tasks import TASKS
from tasks.core import bootstrap
from tasks.core.entities import IGNORED
from tasks.core.models import load_tokenizer
from tasks.core.pictures import data_uri
from tasks.core.progress import warn
from tasks.core.stops import stop_ids
from tasks.core.tokens import TokenRows
from tasks.evaluate.answers import FieldCounts, exact_match, field_counts, parse_object, rouge_l
from tasks.evaluate.generate import generate
from tasks.evaluate.prompted import Prompted
from tasks.evaluate.retention import Retention, is_measured, measure_retention
from tasks.evaluate.scoring import answer_losses, class_logits, token_scores
from tasks.evaluate.spans import in_words, marked, predicted, span_counts
from tasks.evaluate.subject import Subject

#: Examples shown in the report, at most this many right and as many wrong.
EXAMPLES = 8


@dataclass(frozen=True)
class Scores:
    """The metrics, and a prediction for each test row, in the order of the token file.

    statistics: what each metric, and retention, is computed from, by row.
    retention: None where it was not measured.
    """

    metrics: dict[str, Interval]
    statistics: dict[str, bootstrap.Statistic]
    predictions: list[dict[str, Any]]
    how: str
    retention: Retention | None = None

    def accuracy(self) -> Accuracy:
        """The criterion as the report has it."""
        kept = self.retention
        return Accuracy(
            metrics=self.metrics,
            rows=len(self.predictions),
            retention_loss=None if kept is None else kept.loss,
            retention_loss_base=None if kept is None else kept.loss_base,
            retention_change=None if kept is None else kept.interval,
        )


def score(
    subject: Subject,
    model: torch.nn.Module,
    base: torch.nn.Module | None,
    prepared: Path,
    evaluate: Evaluate,
    prompted: Prompted,
) -> Scores:
    """Measure the task's metrics on the prepared test rows, and retention on the general text.

    Args:
        base: the subject's (`Subject.base_beside`). Needed where `is_measured` says so.
    """
    scores = score_rows(subject, model, prepared, evaluate, prompted)
    if not is_measured(subject.task, prepared):
        return scores
    assert base is not None
    kept = measure_retention(model, base, prepared, evaluate)
    return replace(scores, statistics=scores.statistics | {RETENTION: kept.change}, retention=kept)


def score_rows(
    subject: Subject,
    model: torch.nn.Module,
    prepared: Path,
    evaluate: Evaluate,
    prompted: Prompted,
) -> Scores:
    """The task's metrics alone."""
    rows = TokenRows.load(prepared / "tokens" / "test.safetensors")
    lines = (prepared / "test_rows.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    if [text["row"] for text in texts] != rows.source_rows.tolist():
        raise StageError(f"{prepared}: test_rows.jsonl and tokens/test.safetensors name other rows")
    if not texts:
        raise StageError(f"{prepared}: no test rows to measure on")
    labels = TASKS[subject.task].labels
    if labels is None:
        return score_answers(subject, model, rows, texts, evaluate, prompted)
    scorers = {"row": score_classes, "token": score_spans}
    return scorers[labels](subject, model, rows, texts, evaluate)


def score_classes(
    subject: Subject,
    model: torch.nn.Module,
    rows: TokenRows,
    texts: list[dict[str, Any]],
    evaluate: Evaluate,
) -> Scores:
    """Accuracy, macro-F1 and loss of the most probable label."""
    assert rows.labels is not None
    assert subject.labels is not None
    logits_NC = class_logits(model, rows, "classify").astype(np.float64)
    label_N = rows.labels
    top_N = logits_NC.max(axis=1)
    log_sum_N = top_N + np.log(np.exp(logits_NC - top_N[:, None]).sum(axis=1))
    loss_N = log_sum_N - logits_NC[np.arange(len(rows)), label_N]
    require_finite(loss_N, texts)
    got_N = logits_NC.argmax(axis=1)
    right_N = got_N == label_N
    statistics = {
        "accuracy": bootstrap.mean(right_N),
        "macro_f1": bootstrap.macro_f1(label_N, got_N),
        "loss": bootstrap.mean(loss_N),
    }
    predictions = [
        {
            "row": text["row"],
            "expected": subject.labels[label_N[index]],
            "got": subject.labels[got_N[index]],
            "right": bool(right_N[index]),
            "loss": float(loss_N[index]),
            "probability": float(np.exp(top_N[index] - log_sum_N[index])),
        }
        for index, text in enumerate(texts)
    ]
    how = "most probable label; macro_f1 over the labels expected or predicted; loss: nats a row"
    return Scores(intervals(statistics, evaluate), statistics, predictions, how)


def score_spans(
    subject: Subject,
    model: torch.nn.Module,
    rows: TokenRows,
    texts: list[dict[str, Any]],
    evaluate: Evaluate,
) -> Scores:
    """Precision, recall and F1 of whole spans; accuracy and loss of their tokens."""
    assert rows.token_labels is not None
    assert subject.labels is not None
    scores = token_scores(model, rows, "label tokens")
    labelled_T = rows.token_labels != IGNORED
    right_T = labelled_T & (scores.label_T == rows.token_labels)
    right_N, tokens_N, loss_N = (
        np.add.reduceat(values_T, rows.offsets[:-1])
        for values_T in (right_T.astype(int), labelled_T.astype(int), scores.loss_T)
    )
    require_finite(loss_N, texts)
    predictions = [
        {
            "row": text["row"],
            "expected": marked(text),
            "got": predicted(text, rows, index, scores, subject.labels),
            "right": None,
            "loss": float(loss_N[index] / tokens_N[index]),
            "tokens": int(tokens_N[index]),
        }
        for index, text in enumerate(texts)
    ]
    counts = np.array([span_counts(line["expected"], line["got"]) for line in predictions])
    for line, (_, extra, missed) in zip(predictions, counts.tolist(), strict=True):
        line["right"] = not extra and not missed
    true_N, extra_N, missed_N = counts.T
    statistics = {
        "entity_f1": bootstrap.f1(true_N, extra_N, missed_N),
        "entity_precision": bootstrap.ratio(true_N, true_N + extra_N),
        "entity_recall": bootstrap.ratio(true_N, true_N + missed_N),
        "token_accuracy": bootstrap.ratio(right_N, tokens_N),
        "loss": bootstrap.ratio(loss_N, tokens_N),
    }
    how = (
        "a span is right where both its ends and its label are, micro-averaged over the spans of "
        "all rows; an I-label that goes on with no span of its type starts one (CoNLL); a span "
        "past max_length counts as missed; token_accuracy and loss (nats a token): over the "
        "tokens that stand for characters"
    )
    return Scores(intervals(statistics, evaluate), statistics, predictions, how)


def score_answers(
    subject: Subject,
    model: torch.nn.Module,
    rows: TokenRows,
    texts: list[dict[str, Any]],
    evaluate: Evaluate,
    prompted: Prompted,
) -> Scores:
    """Loss and perplexity of the true answers; exact match and field F1 of the generated."""
    loss_N, tokens_N = answer_losses(model, prompted.rows(rows), "loss of answers")
    require_finite(loss_N, texts)
    per_token = bootstrap.ratio(loss_N, tokens_N)
    statistics = {"perplexity": bootstrap.exponential(per_token), "loss": per_token}
    predictions: list[dict[str, Any]] = [
        {
            "row": text["row"],
            "expected": text["answer"],
            "got": None,
            "right": None,
            "loss": float(loss_N[index] / max(1, tokens_N[index])),
            "answer_tokens": int(tokens_N[index]),
        }
        for index, text in enumerate(texts)
    ]

    assert rows.answer_start is not None
    chosen_G = chosen_by_hash(rows, evaluate.generate_rows)
    tokenizer = load_tokenizer(subject.base)
    warn_of_unwritable(tokenizer, [texts[index]["answer"] for index in chosen_G])
    asked = [prompted.ask(rows.row(index)[: rows.answer_start[index]]) for index in chosen_G]
    stops = stop_ids(model, tokenizer, rows)
    prompts = [one.tokens for one in asked]
    answers = generate(model, prompts, stops, evaluate.max_new_tokens)
    for index, one, answer in zip(chosen_G, asked, answers, strict=True):
        line = predictions[index]
        if prompted.shots is not None:
            line["examples"] = prompted.shots.rows.source_rows[one.examples].tolist()
        line["got"] = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        line["right"] = exact_match(line["expected"], line["got"])
        line["new_tokens"], line["stopped"] = len(answer.tokens), answer.stopped

    generated = [predictions[index] for index in chosen_G]
    right_G = np.array([line["right"] for line in generated])
    statistics["exact_match"] = bootstrap.mean(right_G)
    words = ""
    if "rouge_l" in TASKS[subject.task].metrics:
        shared_G = [rouge_l(line["expected"], line["got"]) for line in generated]
        statistics["rouge_l"] = bootstrap.mean(np.array(shared_G))
        words = "rouge_l: F1 of the longest common subsequence of words, mean over rows; "
    counts = object_counts(generated)
    if counts is not None:
        statistics["field_f1"] = bootstrap.f1(*counts.T)
    how = (
        f"{len(generated)} of {len(rows)} rows generated, greedily, at most "
        f"{evaluate.max_new_tokens} tokens; exact_match: equal text but for white space at the "
        "ends; field_f1: path and value of each JSON leaf, micro-averaged, an answer that is no "
        f"JSON object has none; {words}loss: nats per answer token, its end included, over all rows"
    )
    return Scores(intervals(statistics, evaluate), statistics, predictions, how)


def object_counts(generated: list[dict[str, Any]]) -> NDArray[np.int64] | None:
    """Field counts [G, 3] where at least one expected answer is a JSON object, else None.

    Rows whose expected answer is none count no field, and so do not weigh.
    """
    wanted = [parse_object(line["expected"]) for line in generated]
    if not any(wanted):
        return None
    return np.array(
        [
            FieldCounts(0, 0, 0) if expected is None else field_counts(expected, line["got"])
            for expected, line in zip(wanted, generated, strict=True)
        ],
        dtype=np.int64,
    )


def chosen_by_hash(rows: TokenRows, limit: int | None) -> NDArray[np.int64]:
    """The indices of at most `limit` rows, by the hash of their tokens, in file order.

    The same rows for every subject, and for the same data in another order.
    """
    if limit is None or limit >= len(rows):
        return np.arange(len(rows))
    digests = [hashlib.sha256(rows.row(index).tobytes()).digest() for index in range(len(rows))]
    return np.sort(np.array(sorted(range(len(rows)), key=digests.__getitem__)[:limit]))


def intervals(
    statistics: dict[str, bootstrap.Statistic], evaluate: Evaluate
) -> dict[str, Interval]:
    return {
        name: bootstrap.interval(statistic, evaluate.bootstrap)
        for name, statistic in statistics.items()
    }


def examples(predictions: list[dict[str, Any]], prepared: Path) -> list[Example]:
    """The first rows answered wrong and the first answered right, with their prompts."""
    lines = (prepared / "test_rows.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = {text["row"]: text["prompt"] for text in map(json.loads, lines)}
    rows = TokenRows.load(prepared / "tokens" / "test.safetensors")
    places = {row: place for place, row in enumerate(rows.source_rows.tolist())}
    answered = [line for line in predictions if line["right"] is not None]
    wrong = [line for line in answered if not line["right"]][:EXAMPLES]
    right = [line for line in answered if line["right"]][:EXAMPLES]
    return [
        Example(
            prompt=prompts[line["row"]],
            expected=in_words(line["expected"]),
            got=in_words(line["got"]),
            right=line["right"],
            image=None if rows.pixels is None else data_uri(rows.pixels[places[line["row"]]]),
        )
        for line in wrong + right
    ]


def require_finite(loss_N: NDArray[np.float64], texts: list[dict[str, Any]]) -> None:
    """Raise a DivergedError that names the first row whose loss is no number."""
    broken = np.flatnonzero(~np.isfinite(loss_N))
    if len(broken):
        raise DivergedError(
            f"the loss of {len(broken)} of {len(loss_N)} test rows is not finite, first of test "
            f"row {texts[broken[0]]['row']}: the model's weights or activations overflow; "
            "train with a lower learning rate, or with base.dtype float32"
        )


def warn_of_unwritable(tokenizer: Any, answers: list[str]) -> None:
    """Say how many answers the tokenizer cannot spell, so that no model can match them."""
    encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    written = tokenizer.batch_decode(encoded, skip_special_tokens=True)
    lost = sum(not exact_match(answer, text) for answer, text in zip(answers, written, strict=True))
    if lost:
        warn(
            f"the tokenizer cannot write {lost} of {len(answers)} expected answers as they stand "
            "(unknown or normalised characters), so that no model can match them exactly"
        )
