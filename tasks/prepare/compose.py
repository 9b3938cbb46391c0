"""Chat templates at the speed of joining strings, with the same output to the character.

A conversation's shape is its sequence of roles. For each shape the template is rendered once on
probes (`tasks/prepare/probe.py`), which gives the literal text around the contents and the
questions that the template asks of them. Rows that answer these as the probes did are joined from
the literals; all others are rendered by transformers. Some of the joined rows are rendered too,
and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from jinja2.exceptions import TemplateError

from tasks.core.progress import say
from tasks.prepare.probe import MARK, Looked, Probe, Question, watched
from tasks.prepare.render import ChatTemplate, Rendered, TemplateRefused

#: One row in so many is rendered by transformers as well, and the first of each shape.
CHECK_EVERY = 500


class Mismatch(Exception):
    """A joined row is not what transformers renders: the shapes cannot be trusted."""


@dataclass(frozen=True)
class Shape:
    """What the template writes for one sequence of roles.

    literals: the text before, between and after the contents, one more than these.
    trims: whether each content is stripped. leads: for each content the characters before it
    that belong to the answer; None where it is no answer. differs: see `Rendered`.
    """

    literals: list[str]
    trims: list[bool]
    leads: list[int | None]
    questions: list[Question]
    differs: bool

    @cached_property
    def _answers(self) -> list[tuple[int, int, int]]:
        """For each answer its place among the contents, the characters of literals before it,
        and how many of these belong to it."""
        before = list(accumulate(map(len, self.literals)))
        return [
            (index, before[index], lead)
            for index, lead in enumerate(self.leads)
            if lead is not None
        ]

    @cached_property
    def _format(self) -> str:
        return "%s".join(literal.replace("%", "%%") for literal in self.literals)

    @cached_property
    def _trimmed(self) -> list[int]:
        return [index for index, trim in enumerate(self.trims) if trim]

    def fits(self, contents: Sequence[str]) -> bool:
        """Whether the contents answer every question as the probes did."""
        for index, trimmed, test, answer in self.questions:
            content = contents[index].strip() if trimmed else contents[index]
            if test(content) is not answer:
                return False
        return True

    def join(self, contents: Sequence[str]) -> Rendered:
        if self._trimmed:
            contents = [*contents]
            for index in self._trimmed:
                contents[index] = contents[index].strip()
        written = list(accumulate(map(len, contents), initial=0))
        answers = [
            (before - lead + written[index], before + written[index + 1])
            for index, before, lead in self._answers
        ]
        return Rendered(self._format % tuple(contents), answers, self.differs)


class ComposedTemplate:
    """A renderer equal to ChatTemplate, which it falls back to."""

    def __init__(self, tokenizer: Any) -> None:
        self._exact = ChatTemplate(tokenizer)
        self._program = watched_program(tokenizer)
        self._shapes: dict[tuple[str, ...], Shape | None] = {}
        self._joined = 0
        self._said = False

    def __call__(self, roles: tuple[str, ...], contents: Sequence[str]) -> Rendered:
        """Render a conversation.

        Raises:
            TemplateRefused: as ChatTemplate.
            Mismatch: joining is not exact for this template after all.
        """
        fresh = roles not in self._shapes
        if fresh:
            self._shapes[roles] = self._learn(roles)
        shape = self._shapes[roles]
        if shape is None or not shape.fits(contents):
            return self._exact(roles, contents)
        rendered = shape.join(contents)
        self._joined += 1
        if fresh or self._joined % CHECK_EVERY == 0:
            self._check(roles, contents, rendered)
        return rendered

    def _check(self, roles: tuple[str, ...], contents: Sequence[str], rendered: Rendered) -> None:
        try:
            exact = self._exact(roles, contents)
        except TemplateRefused as error:
            raise Mismatch from error
        if exact != rendered:
            raise Mismatch

    def _learn(self, roles: tuple[str, ...]) -> Shape | None:
        """The shape of conversations with these roles, or None where it cannot be known."""
        try:
            if self._program is None:
                raise Looked
            return learn(self._program, roles)
        except (TemplateError, TypeError, ValueError, LookupError):
            return None  # the template refuses these roles; transformers will say so
        except Looked:
            if not self._said:
                self._said = True
                say(
                    "the chat template does more with messages than write them: these rows are "
                    "rendered one by one, which is slower"
                )
            return None


def watched_program(tokenizer: Any) -> Callable[..., str] | None:
    """The template's `render` on probes, or None where probes could be lost from sight."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    source = tokenizer.get_chat_template()
    environment = _compile_jinja_template(source).environment
    try:
        template = watched(environment, source)
    except Looked:
        return None

    def render(messages: list[dict[str, str]], *, generate: bool) -> str:
        text: str = template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=generate,
            **tokenizer.special_tokens_map,
        )
        return text

    return render


def learn(program: Callable[..., str], roles: tuple[str, ...]) -> Shape:
    """Run a template on probes with these roles.

    Raises:
        Looked: it does with a content what cannot be foreseen.
    """
    questions: list[Question] = []
    messages = [
        {"role": role, "content": Probe.of(index, questions)} for index, role in enumerate(roles)
    ]
    literals, marks = taken_apart(program(messages, generate=False))
    if [number for number, _ in marks] != list(range(len(roles))):
        raise Looked
    leads: list[int | None] = [None] * len(roles)
    differs = False
    for index, role in enumerate(roles):
        if role != "assistant":
            continue
        asked, asked_marks = taken_apart(program(messages[:index], generate=True))
        tail = asked[-1]
        same = asked_marks == marks[:index] and asked[:-1] == literals[:index]
        if same and tail != literals[index] and tail.startswith(literals[index]):
            raise Looked  # whether the prompt is a prefix depends on the content
        if asked_marks != marks[:index] and [m for m, _ in asked_marks] == list(range(index)):
            raise Looked  # trimmed in one place and not in the other: likewise
        differs = not (same and literals[index].startswith(tail))
        leads[index] = 0 if differs else len(literals[index]) - len(tail)
    return Shape(literals, [trim == "t" for _, trim in marks], leads, questions, differs)


def taken_apart(text: str) -> tuple[list[str], list[tuple[int, str]]]:
    """The literals of a text with probes, and the probes between them: number, r or t."""
    parts = MARK.split(text)
    return parts[::3], [
        (int(number), trim) for number, trim in zip(parts[1::3], parts[2::3], strict=True)
    ]
