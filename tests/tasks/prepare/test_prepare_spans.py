"""Spans of characters become labels of tokens, and back, or are refused with their reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from schemas.errors import UserError
from tasks.core.entities import IGNORED, label_names, spans_of, type_names
from tasks.prepare.spans import Unfit
from tasks.prepare.tags import labels_of, trimmed

Prepare = Callable[..., Any]
TASK = {"task": "token-classification"}


def row(text: str, *marked: str, label: str = "thing") -> dict[str, Any]:
    """A text whose first occurrences of some words are spans."""
    places = [(text.index(word), text.index(word) + len(word)) for word in marked]
    return {"text": text, "spans": [spot(*place, label) for place in places]}


def spot(start: Any, end: Any, label: Any = "thing") -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def text(*spans: Any) -> dict[str, Any]:
    return {"text": "the train leaves at nine", "spans": list(spans)}


TEST = [row("a ticket to town", "town")]

#: A row after the good first one: its reasons.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"text": "a"}, ["missing:spans"]),
    ({"text": "a", "spans": "b"}, ["wrong_type:spans"]),
    (text("train"), ["wrong_type:spans"]),
    (text({"start": 4, "end": 9}), ["missing:spans.label"]),
    (text(spot(4, 9, 1.5)), ["wrong_type:spans.label"]),
    (text(spot(4, None)), ["missing:spans.end"]),
    (text(spot(4.0, 9)), ["wrong_type:spans.start"]),
    (text(spot(True, 9)), ["wrong_type:spans.start"]),
    (text({**spot(4, 9), "text": "train"}), ["extra_key:spans.text"]),
    (text(spot(4, 9, " ")), ["empty_answer"]),
    (text(spot(4, 9, "a\0")), ["nul_byte"]),
    (text(spot(-1, 3)), ["span_out_of_range"]),
    (text(spot(4, 4)), ["span_out_of_range"]),
    (text(spot(9, 4)), ["span_out_of_range"]),
    (text(spot(20, 25)), ["span_out_of_range"]),
    (text(spot(20, 1 << 63)), ["span_out_of_range"]),
    (text(spot(10, 16), spot(4, 11)), ["overlapping_spans"]),
    (text(spot(4, 9), spot(4, 9)), ["overlapping_spans"]),
    (text(spot(5, 9)), ["span_off_tokens:5-9"]),
    (row("a train, at nine", "train, "), ["span_off_tokens:2-9"]),
    (row("the  train leaves at nine ", "train"), ["duplicate_of:1"]),
]


def test_reasons_of_spans(prepare: Prepare) -> None:
    good = row("the train leaves at nine", "train")
    made = prepare([good, *(line for line, _ in REFUSED)], TEST, **TASK)
    assert made.reasons() == {line: reasons for line, (_, reasons) in enumerate(REFUSED, start=2)}
    report = made.report.splits["train"]
    assert (report.rows_kept, report.spans, report.spans_cut) == (1, 1, 0)
    assert made.rows()["spans"].to_list() == [good["spans"]]


def test_tokens_carry_labels_and_their_characters(prepare: Prepare) -> None:
    given_row = text(spot(20, 24, "time"), spot(0, 9, "thing"), spot(10, 16, "act"))
    made = prepare(
        [given_row, row("the ticket"), row("a train", "train")], [given_row | TEST[0]], **TASK
    )
    labels = json.loads((made.path / "labels.json").read_text())
    assert labels == ["O", "B-act", "I-act", "B-thing", "I-thing", "B-time", "I-time"]
    assert type_names(labels) == ["act", "thing", "time"]
    assert made.report.labels == {"act": 1, "thing": 2, "time": 1}
    rows = made.tokens()
    assert rows.token_labels is not None
    assert rows.token_chars is not None
    first = rows.place(0)
    assert rows.token_labels[first.start] == IGNORED  # <s>
    words = [given_row["text"][start:end] for start, end in rows.token_chars[first].tolist()]
    named = [
        (word, labels[label])
        for word, label in zip(words, rows.token_labels[first], strict=True)
        if label > 0
    ]
    by_label: dict[str, str] = {}
    for word, label in named:
        by_label[label[2:]] = by_label.get(label[2:], "") + word
    assert by_label == {"thing": "thetrain", "act": "leaves", "time": "nine"}
    assert [label for _, label in named if label[0] == "B"] == ["B-thing", "B-act", "B-time"]
    kept = rows.token_labels[rows.place(1)]
    assert set(kept.tolist()) == {IGNORED, 0}
    [line] = (made.path / "test_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["spans"] == TEST[0]["spans"]


def test_a_truncated_row_loses_the_spans_past_its_cut(prepare: Prepare) -> None:
    rows = [row("the train " + "leaves at nine " * 8 + "today", "train", "today")]
    whole = prepare(rows, TEST, **TASK)
    cut = prepare(rows, TEST, max_length=12, on_overflow="truncate", **TASK)
    report = cut.report.splits["train"]
    assert (report.truncated, report.spans, report.spans_cut) == (1, 2, 1)
    assert np.array_equal(cut.tokens().token_labels, whole.tokens().token_labels[:12])
    assert np.array_equal(cut.tokens().token_chars, whole.tokens().token_chars[:12])
    with pytest.raises(UserError, match="too_long"):
        prepare(rows, TEST, max_length=12, **TASK)


def test_labels_that_train_lacks(prepare: Prepare) -> None:
    rows = [row("the train", "train"), row("the town")]
    with pytest.raises(UserError, match=r"labels that no kept train row has: 'other' \(line 1\)"):
        prepare(rows, [row("a ticket", "ticket", label="other")], **TASK)
    with pytest.raises(UserError, match="no train row has a span"):
        prepare([row("the train")], TEST, **TASK)


def test_a_hold_out_refuses_labels_that_train_lacks(prepare: Prepare) -> None:
    """A label of its own for every row: each held-out row has one that train has not."""
    rows = [row(f"the ticket {n}", "ticket", label=f"l{n % 2}") for n in range(60)]
    rows += [row(f"the train {n}", "train", label=f"rare{n}") for n in range(30)]
    made = prepare(rows, test={"holdout": 0.4}, **TASK)
    found = [reasons for reasons in made.reasons("test").values() if reasons]
    assert found
    assert all(reason.startswith("unknown_label:rare") for [reason] in found)
    names = json.loads((made.path / "labels.json").read_text())
    tests = made.tokens("test")
    assert tests.token_labels is not None
    assert {names[label][2:] for label in tests.token_labels if label > 0} == {"l0", "l1"}
    assert len(tests) == made.report.splits["test"].rows_kept


def test_parquet_rows_and_other_names(prepare: Prepare, tmp_path: Path) -> None:
    rows = [row("the train leaves", "train"), row("the town", "town"), row("a ticket")]
    renamed = [{"body": one["text"], "slots": one["spans"]} for one in rows]
    columns = {"text": "body", "spans": "slots"}
    pl.DataFrame(renamed).write_parquet(tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    share = {"holdout": 0.4}
    lines = prepare(renamed, test=share, columns=columns, **TASK)
    parquet = prepare(content, test=share, columns=columns, suffix=".parquet", **TASK)
    for split in ("train", "test"):
        assert lines.rows(split).equals(parquet.rows(split))
    both = pl.concat([lines.rows(), lines.rows("test")]).sort("row")
    assert both["spans"].to_list() == [one["spans"] for one in rows]
    assert both["text"].to_list() == [one["text"] for one in rows]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["the train leaves at nine", "é è naïve"] * 3
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the train leaves at nine", "naive town"] * 3, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ids
    )
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "word piece": word_piece()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_spans_to_labels_and_back(kind: str, data: Any) -> None:
    """Spans that are tokens exactly come back; others, by sets of characters, are refused."""
    letters = st.text("train é中😀\tE\x07.", max_size=12)
    words = st.lists(st.sampled_from(["train", "naïve", "nine", "the"]) | letters, max_size=6)
    content = " ".join(data.draw(words))
    ends = st.integers(0, len(content))
    cuts = sorted(set(data.draw(st.lists(ends, max_size=6))))
    spans = [
        (start, end, data.draw(st.integers(0, 2)))
        for start, end in pairwise(cuts)
        if data.draw(st.booleans())
    ]
    chars = [trimmed(content, place) for place in TOKENIZERS[kind].encode(content).offsets]
    token_chars = [set(range(*place)) for place in chars]

    def exact(start: int, end: int) -> bool:
        own = set(range(start, end))
        covered = set().union(*(token for token in token_chars if token & own))
        return covered <= own and {start, end - 1} <= covered

    fits = all(exact(start, end) for start, end, _ in spans)
    if not fits:
        with pytest.raises(Unfit, match="span_off_tokens"):
            labels_of(chars, spans)
        return
    labels = labels_of(chars, spans)
    found = spans_of(labels, np.array(chars, np.int32).reshape(-1, 2))
    assert [(one.start, one.end, one.type) for one in found] == spans
    assert [label == IGNORED for label in labels] == [not token for token in token_chars]


@pytest.mark.parametrize(
    ("spelt", "spans"),
    [
        ("O B-a I-a O", [(1, 3, "a")]),
        ("I-a I-a O I-b", [(0, 2, "a"), (3, 4, "b")]),
        ("B-a B-a I-b I-a", [(0, 1, "a"), (1, 2, "a"), (2, 3, "b"), (3, 4, "a")]),
        ("B-a O I-a", [(0, 1, "a"), (2, 3, "a")]),
    ],
)
def test_what_labels_spell(spelt: str, spans: list[tuple[int, int, str]]) -> None:
    names = label_names(["a", "b"])
    chars = np.array([(n, n + 1) for n in range(len(spelt.split()))], np.int32)
    found = spans_of([names.index(label) for label in spelt.split()], chars)
    assert [(one.start, one.end, "ab"[one.type]) for one in found] == spans
