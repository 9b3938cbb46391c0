"""Rows for an encoder and a decoder: each side as the tokenizer writes it, with its own limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from schemas.errors import UserError

TASK = {"task": "seq2seq"}


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_base) -> Path:
    """A tokenizer that ends every text with </s>, as T5's does."""
    place = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(make_base(None, "</s>"))
    backend: Tokenizer = tokenizer.backend_tokenizer
    end = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    tokenizer.save_pretrained(place)
    return place


def row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


TEST = [row("Where is it?", "nine")]


def test_both_sides_are_the_tokenizers_own(prepare, base) -> None:
    rows = [row("Where is my card? ", " over a week"), row("The train", "leaves")]
    made = prepare(rows, TEST, base=base, **TASK)
    tokenizer, tokens = AutoTokenizer.from_pretrained(base), made.tokens()
    for index, one in enumerate(rows):
        source, target = tokenizer(one["prompt"]).input_ids, tokenizer(one["completion"]).input_ids
        assert tokens.row(index).tolist() == source + target
        assert tokens.answer_start[index] == len(source)
        assert tokens.mask(index).tolist() == [0] * len(source) + [1] * len(target)
        assert target[-1] == tokenizer.eos_token_id
    assert made.report.template == "none"


def test_an_answer_ends_even_where_the_tokenizer_ends_none(prepare, make_base) -> None:
    base = make_base(None, "</s>")  # writes <s> before a text, and nothing behind it
    made = prepare(TEST, [row("The town", "old")], base=base, **TASK)
    tokenizer, tokens = AutoTokenizer.from_pretrained(base), made.tokens()
    target = tokens.row(0)[tokens.answer_start[0] :].tolist()
    assert target == [*tokenizer("nine").input_ids, tokenizer.eos_token_id]


def test_each_side_has_the_length_for_itself(prepare, base) -> None:
    fits = row("w" * 15, "x" * 15)  # 16 tokens each with their ends, 32 together
    rows = [fits, row("w" * 16, "x"), row("w", "x" * 16), row("w", "go </s> on")]
    made = prepare(rows, TEST, base=base, max_length=16, **TASK)
    assert len(made.tokens()) == 1
    assert made.tokens().lengths.tolist() == [32]
    assert made.reasons() == {2: ["too_long:17"], 3: ["too_long:17"], 4: ["control_token"]}


def test_a_cut_prompt_keeps_its_start_and_its_end_token(prepare, base) -> None:
    rows = [row("abcdefghijklmnopqrstuvwxyz", "x"), row("w", "x" * 30)]
    made = prepare(rows, TEST, base=base, max_length=16, on_overflow="truncate", **TASK)
    tokenizer, tokens = AutoTokenizer.from_pretrained(base), made.tokens()
    whole = tokenizer(rows[0]["prompt"]).input_ids
    assert tokens.row(0)[: tokens.answer_start[0]].tolist() == whole[:15] + whole[-1:]
    assert made.report.splits["train"].truncated == 1
    assert made.reasons() == {2: ["too_long:31"]}, "an answer is never cut"


def test_retention_rows_are_pairs_too(prepare, base) -> None:
    made = prepare(TEST, [row("The town", "old")], retention=[row("a", "b")], base=base, **TASK)
    assert made.tokens("retention").answer_start is not None


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"messages": []}], {}, "rows need `prompt` and `completion`"),
        ([*TEST, *TEST], {"template": "chat"}, "an encoder reads the prompt alone"),
        ([*TEST, *TEST], {"template": "plain"}, "an encoder reads the prompt alone"),
    ],
)
def test_chats_and_templates_are_refused(prepare, base, rows, options, words) -> None:
    with pytest.raises(UserError, match=words):
        prepare(rows, TEST, base=base, **options, **TASK)
