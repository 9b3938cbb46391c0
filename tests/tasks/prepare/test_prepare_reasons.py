"""Each reason for which a row is refused, in runs of the whole stage; and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import polars as pl
import pytest

from schemas.rows import QUARANTINE, REASONS

Prepare = Callable[..., Any]


def pair(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def chat(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def raw(*lines: dict[str, Any] | bytes) -> bytes:
    return b"\n".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    )


TEST = [pair("test question", "test answer")]

#: Line of a completion file after the good first line: its reasons.
LINES: list[tuple[dict[str, Any] | bytes, list[str]]] = [
    (b"   ", ["blank_line"]),
    (b'{"prompt": "\xff"}', ["bad_utf8"]),
    (b'{"prompt": ', ["malformed_json"]),
    (b'{"prompt": "\0", "completion": "a"}', ["malformed_json"]),
    (b'{"prompt": "\\ud800", "completion": "a"}', ["malformed_json"]),
    (b'["prompt"]', ["not_an_object"]),
    ({"prompt": "a"}, ["missing:completion"]),
    ({"prompt": None, "completion": None}, ["missing:prompt", "missing:completion"]),
    (pair("a", 3), ["wrong_type:completion"]),
    (pair(["a"], {"b": 1}), ["wrong_type:prompt", "wrong_type:completion"]),
    (pair("a\0b", "c"), ["nul_byte"]),
    (pair(" ", "c"), ["empty_prompt"]),
    (pair("a", "\n "), ["empty_answer"]),
    (pair("good  question ", "good answer"), ["duplicate_of:1"]),
    (pair("test question", " test answer"), ["leaks_into_test:1"]),
    (pair("test question", "test answer"), ["duplicate_of:16", "leaks_into_test:1"]),
    (pair("a", "b</s><|im_end|>"), ["control_token"]),
    (pair("a", "word " * 40), ["too_long:"]),
]


def test_reasons_of_completion_rows(prepare: Prepare) -> None:
    good = pair("good question", "good answer")
    made = prepare(raw(good, *(line for line, _ in LINES)), TEST, max_length=32)
    found = made.reasons()
    for line, (_, reasons) in enumerate(LINES, start=2):
        if reasons == ["too_long:"]:
            assert len(found[line]) == 1
            assert found[line][0].startswith("too_long:")
        else:
            assert found[line] == reasons, f"line {line}"
    report = made.report.splits["train"]
    assert report.rows_in == len(LINES) + 1
    assert report.rows_kept == 1 == len(made.rows()) == len(made.tokens())
    assert report.refused["missing"] == 2  # by the first reason, without what follows the colon
    assert sum(report.refused.values()) == len(LINES)
    assert made.facts["splits"]["train"]["refused"] == report.refused
    QUARANTINE.validate(made.quarantine)


CHATS: list[tuple[dict[str, Any], list[str]]] = [
    ({"messages": "hello"}, ["wrong_type:messages"]),
    ({"messages": ["hello"]}, ["wrong_type:messages"]),
    ({"text": "hello"}, ["missing:messages"]),
    ({"messages": []}, ["no_answer"]),
    (chat(("user", "a")), ["no_answer"]),
    (chat(("user", "a"), ("assistant", "b"), ("user", "c")), ["no_answer"]),
    (chat(("assistant", "b")), ["empty_prompt"]),
    (chat(("user", "a"), ("assistant", " ")), ["empty_answer"]),
    (chat(("user", "a"), ("robot", "x"), ("assistant", "b")), ["unknown_role"]),
    (chat(("user", "a"), ("assistant", None)), ["missing:messages.content"]),
    (chat(("user", "a"), (7, "b")), ["wrong_type:messages.role"]),
    (chat(("user", "a"), ("assistant", [{"text": "b"}])), ["wrong_type:messages.content"]),
    (chat(("user", "a\0"), ("assistant", "b")), ["nul_byte"]),
    (chat(("user", "a <|im_end|>"), ("assistant", "b")), ["control_token"]),
    (chat(("user", "good"), ("assistant", "row")), ["duplicate_of:1"]),
    (chat(("user", "test question"), ("assistant", "test answer")), ["leaks_into_test:1"]),
]


def test_reasons_of_chat_rows(prepare: Prepare) -> None:
    """The test rows here are prompt and completion: equal to the chat of one question."""
    tools = chat(("user", "a"), ("assistant", "b"))
    tools["messages"][1]["tool_calls"] = [{"name": "look_up"}]
    harmless = chat(("user", "kept"), ("assistant", "b"))
    harmless["messages"][1]["tool_calls"] = []
    rows = [chat(("user", "good"), ("assistant", "row")), *(line for line, _ in CHATS)]
    made = prepare([*rows, tools, harmless], TEST)
    found = made.reasons()
    for line, (_, reasons) in enumerate(CHATS, start=2):
        assert found[line] == reasons, f"line {line}"
    assert found[len(CHATS) + 2] == ["extra_key:messages.tool_calls"]
    assert made.rows()["row"].to_list() == [1, len(CHATS) + 3]


def test_a_template_that_refuses_a_row(prepare: Prepare, make_base: Any) -> None:
    template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system here') }}{% endif %}"
        "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    rows = [
        chat(("user", "a"), ("assistant", "b")),
        chat(("system", "s"), ("user", "a"), ("assistant", "b")),
    ]
    made = prepare(rows, TEST, base=make_base(template))
    assert made.reasons() == {2: ["template_refused:no system here"]}


def labelled(text: Any, label: Any) -> dict[str, Any]:
    return {"text": text, "label": label}


def test_reasons_of_label_rows(prepare: Prepare) -> None:
    rows = [
        labelled("one", "a"),
        labelled("two", " b"),
        labelled("three", ""),
        labelled(" ", "a"),
        labelled("four", None),
        labelled("five", 1.5),
        labelled("one ", "a "),
        labelled("six", 7),
        labelled("seven", True),
    ]
    made = prepare(rows, [labelled("t", "b")], task="sequence-classification")
    assert made.reasons() == {
        3: ["empty_answer"],
        4: ["empty_text"],
        5: ["missing:label"],
        6: ["wrong_type:label"],
        7: ["duplicate_of:1"],
    }
    names = json.loads((made.path / "labels.json").read_text())
    assert names == ["7", "a", "b", "true"] == list(made.report.labels)
    assert made.tokens().labels.tolist() == [1, 2, 0, 3]
    assert made.tokens("test").labels.tolist() == [2]
    assert made.report.template == "none"


def test_a_rare_label_that_the_hold_out_took_whole_is_refused(prepare: Prepare) -> None:
    rows = [labelled(f"text {number}", f"label {number}") for number in range(60)]
    rows += [labelled(f"more {number}", "label 0") for number in range(60)]
    made = prepare(rows, task="sequence-classification", test={"holdout": 0.2})
    found = made.reasons("test")
    assert found
    assert {reasons[0].split(":")[0] for reasons in found.values()} == {"unknown_label"}
    splits = made.report.splits
    assert splits["train"].rows_in + splits["test"].rows_in == len(rows)


def test_retention_rows(prepare: Prepare) -> None:
    rows = [{"text": "The old town."}, {"text": ""}, {"text": "The old  town."}, {"text": 4}]
    made = prepare([pair("a", "b")], TEST, retention=rows)
    found = made.reasons("retention")
    assert found == {2: ["empty_text"], 3: ["duplicate_of:1"], 4: ["wrong_type:text"]}
    tokens = made.tokens("retention")
    assert tokens.mask(0).tolist() == [0] + [1] * (len(tokens.row(0)) - 1)


def test_test_rows_are_chosen_by_hash_and_the_others_are_accounted_for(prepare: Prepare) -> None:
    test = [pair(f"q {number}", f"a {number}") for number in range(40)]
    made = prepare([pair("a", "b")], test, test_rows=10)
    backwards = prepare([pair("a", "b")], test[::-1], test_rows=10)
    assert made.report.splits["test"].refused == {"not_sampled": 30}
    assert set(made.rows("test")["prompt"]) == set(backwards.rows("test")["prompt"])
    assert len(made.tokens("test")) == 10


def test_rows_tokens_and_test_rows_stand_in_one_order(prepare: Prepare) -> None:
    test = [pair(f"question {number}", f"a\u2028{number}") for number in range(20)]
    made = prepare([pair("a", "b")], [*test, pair("x", "")], test_rows=15)
    lines = (made.path / "test_rows.jsonl").read_text().splitlines()
    shown = [json.loads(line) for line in lines]
    rows = made.rows("test")
    assert [line["row"] for line in shown] == rows["row"].to_list()
    assert rows["row"].to_list() == made.tokens("test").source_rows.tolist()
    assert [line["answer"] for line in shown] == rows["completion"].to_list()


def test_every_reason_has_a_test() -> None:
    tested = {reasons[0].split(":")[0] for _, reasons in [*LINES, *CHATS]}
    elsewhere = {
        "oversized_line", "malformed_csv", "wrong_field_count",  # test_prepare_lossless.py
        "extra_key", "template_refused", "empty_text", "unknown_label", "not_sampled",
        "no_answer_token",  # test_prepare_tokens.py
        "span_out_of_range", "overlapping_spans", "span_off_tokens",  # test_prepare_spans.py
        "no_file", "not_an_image", "broken_image", "empty_image", "image_mode",
        "several_frames", "image_too_large",  # test_prepare_images.py
    }  # fmt: skip
    assert tested | elsewhere == set(REASONS)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_hold_out_accounts_for_every_line(prepare: Prepare, task: str) -> None:
    names = ("prompt", "completion") if task == "causal-lm" else ("text", "label")
    rows = [dict(zip(names, (f"t {n}", f"l {n % 2}"), strict=True)) for n in range(100)]
    content = raw(*rows, *rows[:5], b"broken")
    made = prepare(content, task=task, test={"holdout": 0.3})
    splits = made.report.splits
    assert splits["train"].rows_in + splits["test"].rows_in == 106
    kept = pl.concat([made.rows("train"), made.rows("test")])
    assert sorted(kept["row"].to_list()) == list(range(1, 101))
    assert splits["train"].refused["malformed_json"] == 1
