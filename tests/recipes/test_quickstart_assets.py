"""The quickstart's own files: its rows can be remade, its mess is there, its base loads and speaks.

The answers' shape is read from the rows alone, so that a mistake of the generator shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart"
BASE = QUICKSTART / "base"
ROWS = ("train.jsonl", "test.jsonl", "retention.jsonl")
MAX_BASE_BYTES = 8_000_000


def run_script(name: str, *arguments: object) -> str:
    """The output of one of the quickstart's scripts, as a user would start it."""
    command = [sys.executable, str(QUICKSTART / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def lines(name: str) -> list[str]:
    return (QUICKSTART / name).read_text(encoding="utf-8").splitlines()


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(name)]


def even(text: str) -> str:
    """White space and Unicode form evened out."""
    return " ".join(unicodedata.normalize("NFC", text).split())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        BASE, local_files_only=True, use_safetensors=True, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def sorted_train(tokenizer: Any) -> tuple[Counter[str], list[dict[str, str]]]:
    """What is wrong with the lines of train.jsonl, counted, and the rows that stay."""
    test_prompts = {even(row["prompt"]) for row in rows("test.jsonl")}
    seen: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    clean = []
    for line in lines("train.jsonl"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            counts["malformed line"] += 1
            continue
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            counts["wrong type"] += 1
        elif not completion.strip():
            counts["empty answer"] += 1
        elif len(tokenizer(prompt + completion)["input_ids"]) > 256:
            counts["over 256 tokens"] += 1
        elif even(prompt) in test_prompts:
            counts["leak from the test file"] += 1
        elif even(prompt) in seen:
            counts["duplicate"] += 1
            seen[even(prompt)].append(prompt)
        else:
            seen[even(prompt)] = [prompt]
            clean.append(row)
    counts["duplicate with other characters"] = sum(
        len(set(prompts)) > 1 for prompts in seen.values()
    )
    return counts, clean


def test_rows_are_remade_byte_for_byte(tmp_path: Path) -> None:
    run_script("make_data.py", "--out", tmp_path)
    for name in ROWS:
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes(), name


def test_every_kind_of_mess_is_in_the_train_rows(
    sorted_train: tuple[Counter[str], list[dict[str, str]]], tmp_path: Path
) -> None:
    counts, clean = sorted_train
    printed = run_script("make_data.py", "--out", tmp_path)
    planted = {
        line[:32].strip(): int(line[32:]) for line in printed.splitlines() if line[32:].strip()
    }
    for kind in (
        "malformed line",
        "wrong type",
        "empty answer",
        "over 256 tokens",
        "leak from the test file",
    ):
        assert counts[kind] == planted[kind] > 0, kind
    unlike = planted["duplicate but for white space"] + planted["duplicate but for Unicode form"]
    assert counts["duplicate"] == planted["exact duplicate"] + unlike
    # A row may have been doubled in both ways.
    assert 0.8 * unlike <= counts["duplicate with other characters"] <= unlike
    assert len(clean) == planted["clean"]
    assert len(lines("train.jsonl")) == planted["lines in train.jsonl"]


def test_clean_train_rows_and_test_rows_are_disjoint(
    sorted_train: tuple[Counter[str], list[dict[str, str]]],
) -> None:
    _, clean = sorted_train
    test = [even(row["prompt"]).casefold() for row in rows("test.jsonl")]
    assert len(set(test)) == len(test) == 300
    assert not set(test) & {even(row["prompt"]).casefold() for row in clean}


def test_answers_are_json_with_the_fields_of_their_intent(
    sorted_train: tuple[Counter[str], list[dict[str, str]]],
) -> None:
    fields: dict[str, set[tuple[str, ...]]] = {}
    for row in [*sorted_train[1], *rows("test.jsonl")]:
        intent, *values = json.loads(row["completion"]).items()
        assert intent[0] == "intent"
        assert all(isinstance(value, str) and value for _, value in values)
        fields.setdefault(intent[1], set()).add(tuple(name for name, _ in values))
    assert len(fields) == 10
    for intent, shapes in fields.items():
        assert len(shapes) == 1, intent
        assert 1 <= len(next(iter(shapes))) <= 3, intent


def test_rows_are_short_enough_for_a_quick_start(tokenizer: Any) -> None:
    for row in rows("test.jsonl"):
        assert len(tokenizer(row["prompt"])["input_ids"]) <= 80
        assert len(tokenizer(row["completion"])["input_ids"]) <= 64


def test_retention_text_is_plain_and_was_held_out_of_pretraining() -> None:
    texts = [row["text"] for row in rows("retention.jsonl")]
    assert len(set(texts)) == len(texts) == 200
    for text in texts:
        assert "<|" not in text
        # What `corpus.split_of` keeps away from pretraining.
        assert zlib.crc32(text.encode()) % 100 == 0


def test_base_is_small_and_holds_no_pickle() -> None:
    names = {path.name for path in BASE.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= MAX_BASE_BYTES


def test_base_loads_offline_and_generates(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello, I am Mara Lind from Oslo."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    reply = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert reply.endswith(tokenizer.eos_token)
    assert "{" not in reply


def test_chat_template_is_a_prefix_of_the_answered_chat(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{}"}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert answered == asked + "{}" + tokenizer.eos_token
    with pytest.raises(Exception, match="roles are user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Hi"}], tokenize=False)


def test_numbers_become_single_digits(tokenizer: Any) -> None:
    ids = tokenizer("order 48213", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids[-5:]] == list("48213")


@pytest.mark.slow
def test_pretraining_is_deterministic(tmp_path: Path) -> None:
    """Two short runs, each in its own process, end in the same bytes."""
    outs = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, str(QUICKSTART / "make_base.py"), "--steps", "3", "--out"]
    for process in [subprocess.Popen([*command, str(out)]) for out in outs]:
        assert process.wait() == 0
    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes(), path.name
