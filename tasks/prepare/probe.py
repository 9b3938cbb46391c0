"""A stand-in for a message's content that knows what a chat template asks of it.

A template is a program. Run on probes it shows its literal text, and every question that it asks
of a content is recorded with the answer that was given. For contents that answer all questions
the same way the program takes the same path, so that its output is the same literals around
other contents. An operation that is neither a question with a recorded answer nor plain output
raises `Looked`: nothing is assumed about such a template.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, nodes

#: How a probe looks in the output: its number, and whether it is trimmed (t) or raw (r).
MARK = re.compile("\ue0c4(\\d+)([rt])\ue0c5")

#: What loses sight of a probe: its text is captured as a plain string, which may be looked at.
CAPTURES: tuple[type[nodes.Node], ...] = (
    nodes.Macro,
    nodes.CallBlock,
    nodes.FilterBlock,
    nodes.AssignBlock,
)

#: Filters that handle contents as they are, or only look at the list of messages.
HARMLESS_FILTERS = {
    "trim", "string", "default", "d", "length", "count", "first", "last", "list", "reverse",
    "selectattr", "rejectattr",
}  # fmt: skip

#: Tests whose result is the same for every string.
TYPE_TESTS = {
    "boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none",
    "number", "sequence", "string", "true", "undefined",
}  # fmt: skip


class Looked(BaseException):
    """The template looks into a content. No Exception, which Jinja's own tests would swallow."""


#: A question of a template: index of the content, trimmed, and a test with its answer.
Question = tuple[int, bool, Callable[[str], bool], bool]


class Probe(str):
    """See the module. questions: shared by the probes of one rendering."""

    questions: list[Question]

    def __new__(cls, text: str, questions: list[Question]) -> Probe:
        probe = super().__new__(cls, text)
        probe.questions = questions
        return probe

    @classmethod
    def of(cls, index: int, questions: list[Question]) -> Probe:
        return cls(f"\ue0c4{index}r\ue0c5", questions)

    def _ask(self, test: Callable[[str], bool], answer: bool) -> bool:
        found = MARK.fullmatch(str(self))
        if not found:
            raise Looked
        self.questions.append((int(found[1]), found[2] == "t", test, answer))
        return answer

    def __add__(self, other: str) -> Probe:
        return Probe(str(self) + str(other), self.questions)

    def __radd__(self, other: str) -> Probe:
        return Probe(str(other) + str(self), self.questions)

    def strip(self, chars: Any = None) -> Probe:
        found = MARK.fullmatch(str(self))
        if not found or chars is not None:
            raise Looked
        return Probe(f"\ue0c4{found[1]}t\ue0c5", self.questions)

    def __bool__(self) -> bool:
        return self._ask(bool, True)

    def __eq__(self, other: object) -> bool:
        return self._ask(lambda content: content == other, False)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __contains__(self, part: object) -> bool:
        return self._ask(lambda content: str(part) in content, False)

    def startswith(self, prefix: Any, *place: Any) -> bool:
        return self._ask(lambda content: content.startswith(prefix, *place), False)

    def endswith(self, suffix: Any, *place: Any) -> bool:
        return self._ask(lambda content: content.endswith(suffix, *place), False)


def _looked(*_: Any, **__: Any) -> Any:
    raise Looked


for _name in set(dir(str)) - set(vars(Probe)) - set(dir(object)):
    setattr(Probe, _name, _looked)
for _name in ("__hash__", "__format__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Probe, _name, _looked)


def holds_probe(value: Any) -> bool:
    """Whether a probe stands in a value or anywhere within it."""
    if isinstance(value, Probe):
        return True
    if isinstance(value, dict):
        return any(holds_probe(item) for item in value.values())
    return isinstance(value, list | tuple) and any(holds_probe(item) for item in value)


def _guarded(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def filtered(*values: Any, **named: Any) -> Any:
        if holds_probe(values) or holds_probe(named):
            raise Looked
        return function(*values, **named)

    return filtered


def _type_only(function: Any) -> Callable[..., Any]:
    @functools.wraps(function)
    def tested(value: Any, *rest: Any) -> Any:
        return function("text" if isinstance(value, Probe) else value, *rest)

    return tested


def watched(environment: Environment, source: str) -> Any:
    """A template in whose rendering no probe is looked at unseen.

    Raises:
        Looked: it captures its own output, where a probe would be lost from sight.
    """
    tree = environment.parse(source)
    outputs = list(tree.find_all(nodes.Output))
    shown = {id(node) for output in outputs for node in output.find_all(nodes.Concat)}
    hidden = [node for node in tree.find_all(nodes.Concat) if id(node) not in shown]
    if hidden or any(tree.find(kind) is not None for kind in CAPTURES):
        raise Looked
    watching = environment.overlay()
    watching.filters = {
        name: function if name in HARMLESS_FILTERS else _guarded(function)
        for name, function in environment.filters.items()
    }
    watching.tests = {
        name: _type_only(function) if name in TYPE_TESTS else function
        for name, function in environment.tests.items()
    }
    return watching.from_string(source)
