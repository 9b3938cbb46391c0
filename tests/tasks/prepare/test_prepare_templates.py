"""Chat templates joined from literals are, to the character, what transformers renders.

The templates are short forms of what the field's models ship: each has one of their habits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tasks.prepare import compose
from tasks.prepare.compose import ComposedTemplate, Mismatch
from tasks.prepare.render import ChatTemplate, TemplateRefused

GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "trimmed": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
    "(m.content | trim) + '<|im_end|>' }}{% endfor %}" + GENERATE,
    "stripped, joined by tilde": "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ "
    "m.content.strip() ~ '<|im_end|>' }}{% endfor %}" + GENERATE,
    "system moved into the first question": "{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '<s>[INST] ' + (first if loop.first else '') "
    "+ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
    "default system message": "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "asks whether the content thinks": "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "asks how the content begins": "{% for m in messages %}"
    "{% if m.content is string and m.content.startswith('a') %}{{ 'A:' }}{% endif %}"
    "{% if m.content == 'b' %}{{ 'B:' }}{% endif %}{% if not m.content %}{{ 'none' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "as JSON": "{% for m in messages %}{{ m.role + (m.content | tojson) + '<|im_end|>' }}"
    "{% endfor %}" + GENERATE,
    "macro that looks at its text": "{% macro show(text) %}{{ text }}{% endmacro %}"
    "{% for m in messages %}{% set shown = show(m.content) | trim %}"
    "{% if shown.startswith('a') %}{{ 'A:' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + shown + '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "length of the content": "{% for m in messages %}{{ m.content | length }}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "upper case questions": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'user' %}{{ m.content | upper }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "last answer thinks": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + GENERATE,
    "another generation prompt": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}",
    "no system": "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}" + GENERATE,
    "generation block": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}" + GENERATE,
}

#: Templates whose rows must be joined, lest the fast way quietly stops being used.
JOINED = {
    "chatml", "trimmed", "stripped, joined by tilde", "system moved into the first question",
    "default system message", "asks whether the content thinks", "asks how the content begins",
    "last answer thinks", "another generation prompt", "no system",
}  # fmt: skip

CONTENT = st.one_of(
    st.sampled_from(["a", "b", " b ", "think </think>\n b", "\n\nx\n", "[INST]", "é"]),
    st.text(alphabet="ab \n</think>{}'\"", max_size=12),
)
ROLES = st.sampled_from(
    [
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("user", "assistant", "user", "assistant"),
        ("system", "user", "assistant", "user", "assistant"),
    ]
)


@pytest.fixture(scope="module")
def tokenizer_with(make_base: Callable[..., Path]) -> Callable[[str], Any]:
    return lambda template: AutoTokenizer.from_pretrained(make_base(template))


def outcome(render: Any, roles: tuple[str, ...], contents: list[str]) -> Any:
    try:
        return render(roles, contents)
    except TemplateRefused as refusal:
        return refusal.args


@pytest.mark.parametrize("name", TEMPLATES)
def test_joined_is_rendered(
    name: str, tokenizer_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its own checks of samples, so that a difference would show here."""
    monkeypatch.setattr(ComposedTemplate, "_check", lambda *_: None)
    tokenizer = tokenizer_with(TEMPLATES[name])
    exact, joined = ChatTemplate(tokenizer), ComposedTemplate(tokenizer)

    @settings(max_examples=40, deadline=None)
    @given(roles=ROLES, data=st.data())
    def check(roles: tuple[str, ...], data: st.DataObject) -> None:
        contents = [data.draw(CONTENT) for _ in roles]
        assert outcome(joined, roles, contents) == outcome(exact, roles, contents)

    check()
    assert (joined._joined > 0) == (name in JOINED)


def test_answers_stand_where_they_are_said_to(tokenizer_with: Any) -> None:
    roles = ("user", "assistant", "user", "assistant")
    contents = ["t", "think", "h", "</think> t"]
    for name in ("as JSON", "macro that looks at its text", "length of the content"):
        try:
            rendered = ChatTemplate(tokenizer_with(TEMPLATES[name]))(roles, contents)
        except TemplateRefused:
            continue
        shown = [rendered.text[start:end] for start, end in rendered.answers]
        assert shown[0].endswith("think"), name
        assert shown[1].endswith("</think> t"), name


def test_a_template_that_fools_the_probes_is_found_out(
    tokenizer_with: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison of samples, tried on a template made wrong on purpose."""
    joined = ComposedTemplate(tokenizer_with(TEMPLATES["chatml"]))
    assert joined._program is not None
    learned = compose.learn(joined._program, ("user", "assistant"))
    wrong = compose.Shape(
        ["", *learned.literals[1:]], learned.trims, learned.leads, [], learned.differs
    )
    monkeypatch.setattr(compose, "learn", lambda *_: wrong)
    with pytest.raises(Mismatch):
        joined(("user", "assistant"), ["a", "b"])


def test_a_run_goes_on_exactly_where_joining_is_not_exact(
    prepare: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q {number}", "completion": "a"} for number in range(5)]
    right = prepare(rows, rows[:1]).tokens()

    def check(*_: Any) -> None:
        raise Mismatch

    monkeypatch.setattr(ComposedTemplate, "_check", check)
    slow = prepare(rows, rows[:1]).tokens()
    assert slow.input_ids.tolist() == right.input_ids.tolist()
    assert "one by one" in capfd.readouterr().err
