"""Whole spans, counted as the CoNLL 2003 script counts them, against a slow reference."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from schemas.recipe import Evaluate
from schemas.report import TASK_METRICS
from tasks.core.entities import IGNORED, label_names
from tasks.core.tokens import TokenRows
from tasks.evaluate.accuracy import Scores, examples, score
from tasks.evaluate.prompted import asking
from tasks.evaluate.subject import Subject

LABELS = label_names(["date", "time"])
TEXT = "abcdefghijkl"
ROWS = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9),
    min_size=1,
    max_size=6,
)


class Parrot(nn.Module):
    """Its logits are a table's row for each id, and the id of a token is its predicted label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(5 * torch.eye(len(LABELS)) + torch.rand(len(LABELS)))
        self.config = SimpleNamespace(pad_token_id=0)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def chunks(labels: list[str]) -> set[tuple[int, int, str]]:
    """As conlleval.pl: a chunk ends, and one starts, by the labels on either side of a place."""
    found, start = set(), 0
    for at in range(len(labels) + 1):
        before = labels[at - 1] if at else "O"
        after = labels[at] if at < len(labels) else "O"
        changes = before[2:] != after[2:] or after[0] == "B"
        if before != "O" and (after == "O" or changes):
            found.add((start, at, before[2:]))
        if after != "O" and (before == "O" or changes):
            start = at
    return found


def write_rows(out: Path, rows: list[list[tuple[int, int]]]) -> None:
    """(true label, predicted label) of tokens of one character each. Before them stands a token
    of no character, which the model calls B-date."""
    whole = [[(IGNORED, 1), *row] for row in rows]
    chars = [(max(0, at - 1), at) for row in whole for at in range(len(row))]
    flat = [pair for row in whole for pair in row]
    (out / "tokens").mkdir(exist_ok=True)
    TokenRows(
        input_ids=np.array([got for _, got in flat], np.int32),
        offsets=np.cumsum([0, *map(len, whole)]),
        source_rows=np.arange(len(rows)) + 1,
        token_labels=np.array([true for true, _ in flat], np.int32),
        token_chars=np.array(chars, np.int32),
    ).save(out / "tokens" / "test.safetensors")
    lines = []
    for number, row in enumerate(rows, start=1):
        spans = sorted(chunks([LABELS[true] for true, _ in row]))
        marked = [{"start": s, "end": e, "label": label} for s, e, label in spans]
        lines.append(json.dumps({"row": number, "prompt": TEXT, "spans": marked}))
    (out / "test_rows.jsonl").write_text("\n".join(lines) + "\n")


def subject() -> Subject:
    nowhere = Path("nowhere")
    return Subject(
        "base", "token-classification", "float32", nowhere, LABELS, None, False, None, None, 0
    )


def scored(model: nn.Module, prepared: Path) -> Scores:
    evaluate = Evaluate(bootstrap=100)
    return score(subject(), model, None, prepared, evaluate, asking(subject(), model, evaluate))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ROWS)
def test_every_metric_is_the_slow_references(tmp_path: Path, rows) -> None:
    write_rows(tmp_path, rows)
    model = Parrot()
    scores = scored(model, tmp_path)
    true = [chunks([LABELS[label] for label, _ in row]) for row in rows]
    got = [chunks([LABELS[label] for _, label in row]) for row in rows]
    right = sum(len(a & b) for a, b in zip(true, got, strict=True))
    wanted, given_ = sum(map(len, true)), sum(map(len, got))
    precision = right / given_ if given_ else 0.0
    recall = right / wanted if wanted else 0.0
    both = precision + recall
    pairs = torch.tensor([pair for row in rows for pair in row])
    losses = nn.functional.cross_entropy(model.table[pairs[:, 1]].detach(), pairs[:, 0])
    expected = {
        "entity_precision": precision,
        "entity_recall": recall,
        "entity_f1": 2 * precision * recall / both if both else 0.0,
        "token_accuracy": float((pairs[:, 0] == pairs[:, 1]).double().mean()),
        "loss": float(losses),
    }
    assert expected.keys() == TASK_METRICS["token-classification"].keys()
    for name, value in expected.items():
        # The reference's loss is a mean in float32; all others are quotients of integers.
        assert scores.metrics[name].value == pytest.approx(value, rel=1e-5, abs=1e-12), name
    for line, a, b in zip(scores.predictions, true, got, strict=True):
        assert line["right"] == (a == b)
        for spans, own in (("expected", a), ("got", b)):
            assert {(s["start"], s["end"], s["label"]) for s in line[spans]} == own
            assert all(s["text"] == TEXT[s["start"] : s["end"]] for s in line[spans])


def test_a_span_past_the_cut_counts_as_missed(tmp_path: Path) -> None:
    """The row's text has a span behind the last token: no model that is cut there can find it."""
    write_rows(tmp_path, [[(1, 1), (0, 0)]])
    line = json.loads((tmp_path / "test_rows.jsonl").read_text())
    line["spans"].append({"start": 7, "end": 9, "label": "time"})
    (tmp_path / "test_rows.jsonl").write_text(json.dumps(line) + "\n")
    scores = scored(Parrot(), tmp_path)
    assert scores.metrics["entity_precision"].value == 1
    assert scores.metrics["entity_recall"].value == 0.5
    [shown] = examples(scores.predictions, tmp_path)
    assert shown.expected == "date [0:1] a\ntime [7:9] hi"
    assert shown.got == "date [0:1] a"
    assert not shown.right


def test_the_score_of_a_span_is_the_mean_of_its_tokens(tmp_path: Path) -> None:
    write_rows(tmp_path, [[(0, 1), (0, 2), (0, 0)]])
    scores = scored(Parrot(), tmp_path)
    probabilities = Parrot().table.detach().double().softmax(-1)
    [span] = scores.predictions[0]["got"]
    expected = float(probabilities[1, 1] + probabilities[2, 2]) / 2
    # The model's own float32 logits, to float64 before the softmax on both sides.
    assert span["score"] == pytest.approx(expected, rel=1e-12)
