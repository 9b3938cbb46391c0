"""What is learned: the answer and its end, never the prompt, never half of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from schemas.errors import UserError
from schemas.recipe import Data, Source
from tasks.prepare.reader import open_reader
from tasks.prepare.spans import Counts, Unfit, causal_row, cut_prompt

Prepare = Callable[..., Any]

LLAMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' "
    "+ message['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_EOS = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEST = [{"prompt": "test question", "completion": "test answer"}]
WORDS = st.text(alphabet='abc é\n{}"1', min_size=1, max_size=20).filter(lambda text: text.strip())


def decode(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(np.asarray(ids).tolist(), clean_up_tokenization_spaces=False)
    return text


def test_the_mask_decodes_to_the_answers_and_their_end(prepare: Prepare, make_base: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is my card?"},
        {"role": "assistant", "content": "In the post."},
        {"role": "user", "content": "Since when?"},
        {"role": "assistant", "content": "A week ago."},
    ]
    made = prepare([{"messages": messages}], TEST)
    tokenizer = AutoTokenizer.from_pretrained(make_base())
    rows = made.tokens()
    ids, mask = rows.row(0), rows.mask(0)
    assert decode(tokenizer, ids[mask == 1]) == "In the post.<|im_end|>A week ago.<|im_end|>"
    assert decode(tokenizer, ids[rows.answer_start[0] :]) == "A week ago.<|im_end|>"
    asked = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert ids[: rows.answer_start[0]].tolist() == asked
    assert made.report.splits["train"].answer_tokens == mask.sum()


def test_thinking_that_the_template_adds_is_learned(prepare: Prepare, make_base: Any) -> None:
    """The answer begins where the generation prompt ends: the model must write the rest."""
    base = make_base(THINKING)
    made = prepare([{"prompt": "a", "completion": "b"}], TEST, base=base)
    rows = made.tokens()
    tokenizer = AutoTokenizer.from_pretrained(base)
    learned = decode(tokenizer, rows.row(0)[rows.mask(0) == 1])
    assert learned == "<think>\n\n</think>\n\nb<|im_end|>"


@pytest.mark.parametrize("template", [None, NO_EOS], ids=["plain", "chat"])
def test_eos_is_appended_where_none_is_written(
    prepare: Prepare, make_base: Any, template: str | None
) -> None:
    base = make_base(template, "</s>")
    made = prepare([{"prompt": "Say b. ", "completion": "b"}], TEST, base=base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = made.tokens()
    assert rows.row(0)[-1] == tokenizer.eos_token_id
    assert rows.mask(0)[-1] == 1
    assert decode(tokenizer, rows.row(0)[rows.mask(0) == 1]) == "b</s>"
    if template is None:
        assert rows.row(0)[0] == tokenizer.bos_token_id
        assert made.report.template == "plain"


def test_the_base_model_s_own_stop_tokens_count(prepare: Prepare, make_base: Any) -> None:
    """A turn that ends in a stop token of generation_config.json needs no EOS behind it."""
    base = make_base(LLAMA, "</s>")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = base / "generation_config.json"
    row = [{"prompt": "a", "completion": "b"}]
    without = prepare(row, TEST, base=base).tokens().row(0).tolist()
    config.write_text(f'{{"eos_token_id": [1, {tokenizer.convert_tokens_to_ids("<|im_end|>")}]}}')
    try:
        with_it = prepare(row, TEST, base=base).tokens().row(0).tolist()
    finally:
        config.unlink()
    assert decode(tokenizer, without).endswith("b</s>")
    assert decode(tokenizer, with_it).endswith("b<|im_end|>")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompt=WORDS, completion=WORDS)
@pytest.mark.parametrize("template", [None, LLAMA, THINKING])
def test_prompt_and_answer_meet_where_the_prompt_alone_ends(
    make_base: Any, template: str | None, prompt: str, completion: str
) -> None:
    """The tokens before answer_start are those of the prompt alone, unless a token spans the
    border; then they are the prompt's but for its end, and the row is counted."""
    base = make_base(template)
    source = Source(path="x")
    reader = open_reader(base, "causal-lm", Data(train=source, test=source), set())
    text = reader.text_rules("completion")
    assert text.render is not None
    rendered = text.render(("user", "assistant"), [prompt, completion])
    rules, counts = reader.rules("completion"), Counts()
    [encoding] = reader.backend.encode_batch([rendered.text], add_special_tokens=rules.add_special)
    ids, spans, _ = causal_row(encoding, rendered, rules, counts)
    start, end = spans[-1]
    asked = rendered.text[: rendered.answers[-1][0]]
    alone = reader.backend.encode(asked, add_special_tokens=rules.add_special).ids
    assert end == len(ids)
    assert ids[-1] in rules.stops
    if counts.merged_borders:
        assert len(ids[:start]) < len(alone) or ids[:start] != alone
    else:
        assert ids[:start] == alone
        answer = completion.strip() if template == LLAMA else completion
        wanted = ("<think>\n\n</think>\n\n" if template == THINKING else "") + answer
        assert decode(reader.tokenizer, ids[start:]) == wanted + "<|im_end|>"


@settings(max_examples=200)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    bos=st.booleans(),
    limit=st.integers(2, 40),
)
def test_truncation_never_touches_an_answer(
    lengths: list[tuple[int, int]], bos: bool, limit: int
) -> None:
    """Prompts are tokens above 100, answers below; the cut is checked by content."""
    ids, spans, answers = ([99] if bos else []), [], []
    for prompt, answer in lengths:
        ids = [*ids, *range(100 + len(ids), 100 + len(ids) + prompt)]
        spans.append((len(ids), len(ids) + answer))
        ids = [*ids, *range(len(ids), len(ids) + answer)]
        answers.append(ids[-answer:])
    source = Source(path="x")
    rules = _rules(Data(train=source, test=source, max_length=8, on_overflow="truncate"), limit)
    if len(ids) <= limit:
        return
    if len(answers[-1]) + 1 > limit:  # the answer and a token before it do not fit
        with pytest.raises(Unfit, match=f"too_long:{len(ids)}"):
            cut_prompt(ids, spans, rules)
        return
    short, moved = cut_prompt(ids, spans, rules)
    assert len(short) == limit
    assert short[-1] == ids[-1]
    assert short[0] == (99 if bos else short[0])
    kept = [short[start:end] for start, end in moved]
    assert kept == answers[len(answers) - len(kept) :]
    assert kept
    assert all(start > 0 for start, _ in moved)


def _rules(data: Data, limit: int) -> Any:
    from tasks.prepare.spans import Rules

    return Rules(limit, data.on_overflow, add_special=False, suffix=0, bos=99)


def test_overflow(prepare: Prepare, make_base: Any) -> None:
    rows = [
        {"prompt": "word " * 100, "completion": "The answer."},
        {"prompt": "short", "completion": "word " * 100},
        {"prompt": "short", "completion": "also short"},
    ]
    refused = prepare(rows, TEST, max_length=32)
    assert list(refused.reasons()) == [1, 2]
    cut = prepare(rows, TEST, max_length=32, on_overflow="truncate")
    assert list(cut.reasons()) == [2]
    report = cut.report.splits["train"]
    assert (report.truncated, report.label_less, report.rows_kept) == (1, 0, 2)
    tokens = cut.tokens()
    assert tokens.lengths.tolist()[0] == 32
    tokenizer = AutoTokenizer.from_pretrained(make_base())
    assert decode(tokenizer, tokens.row(0)[tokens.mask(0) == 1]) == "The answer.<|im_end|>"


def test_classification_text_is_cut_from_the_right(prepare: Prepare) -> None:
    rows = [{"text": "word " * 50, "label": "a"}, {"text": "short", "label": "b"}]
    test = [{"text": "test", "label": "a"}]
    made = prepare(rows, test, task="sequence-classification", max_length=8, on_overflow="truncate")
    whole = prepare(rows, test, task="sequence-classification")
    assert made.tokens().row(0).tolist() == whole.tokens().row(0)[:8].tolist()
    assert made.report.splits["train"].truncated == 1
    assert made.tokens().loss_mask is None


def test_an_answer_that_the_tokenizer_drops_is_label_less(prepare: Prepare, make_base: Any) -> None:
    """Such a row would add nothing but its EOS to the loss, and be called learned."""
    from tokenizers import Tokenizer, normalizers

    base = make_base(None, "</s>")
    path = base / "tokenizer.json"
    before = path.read_text()
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Replace("~", "")
    tokenizer.save(str(path))
    try:
        rows = [{"prompt": "a", "completion": "~~"}, {"prompt": "a", "completion": "~b"}]
        made = prepare(rows, TEST, base=base)
        assert made.reasons() == {1: ["no_answer_token"]}
        assert made.report.splits["train"].label_less == 1
        with pytest.raises(UserError, match="no token of the answer"):
            prepare(rows[:1], TEST, base=base)
    finally:
        path.write_text(before)


def test_the_same_rows_give_the_same_bytes(prepare: Prepare) -> None:
    rows = [{"prompt": f"q {number}", "completion": "a"} for number in range(30)]
    one, other = prepare(rows, test={"holdout": 0.2}), prepare(rows, test={"holdout": 0.2})
    for path in sorted(one.path.rglob("*")):
        relative = path.relative_to(one.path)
        if path.is_file() and relative.parts[0] != "scratch":
            assert path.read_bytes() == (other.path / relative).read_bytes(), relative


def test_two_hold_outs_of_a_file_share_no_row_and_leave_no_row_of_the_other_to_train(
    prepare: Prepare,
) -> None:
    """What a search measures on, beside the recipe's own hold-out, is a part of its train rows."""
    rows = [{"prompt": f"q {number}", "completion": "a"} for number in range(200)]
    own = prepare(rows, test={"holdout": 0.2})
    search = prepare(rows, test={"holdout": 0.1, "after": 0.2})
    train, test = (set(own.tokens(split).source_rows.tolist()) for split in ("train", "test"))
    left, tried = (set(search.tokens(split).source_rows.tolist()) for split in ("train", "test"))
    assert train | test == set(range(1, 201))
    assert tried
    assert tried < train
    assert left == train - tried
