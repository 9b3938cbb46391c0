"""From a row to the text that the model reads, and where in it the answers stand.

    plain   prompt followed by completion
    chat    the model's own chat template

An answer begins where the text of its generation prompt ends, so that the model learns exactly
what it will be asked for, and ends where the row's own words end. What the template writes after
that (an end-of-turn token, white space) is looked at in tokens: `tasks/prepare/spans.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

#: Marks a place in a rendered text. Private-use characters, which no template looks for.
MARK = "\ue0c1\uf8a3\ue0c1"


class TemplateRefused(Exception):
    """The template cannot show this conversation; args[0] says why in a few words."""


class Rendered(NamedTuple):
    """text, and the answers in it as [start, end) in characters, in order.

    prompt_differs: the template writes the last answer's turn otherwise than the generation
    prompt begins it, so that the model will be asked with another text than it has learned.
    """

    text: str
    answers: list[tuple[int, int]]
    prompt_differs: bool = False


#: Renders a conversation, given as its roles and its contents; may raise TemplateRefused.
Render = Callable[[tuple[str, ...], Sequence[str]], Rendered]


def render_plain(roles: tuple[str, ...], contents: Sequence[str]) -> Rendered:
    """A prompt followed by its completion."""
    prompt, completion = contents
    return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


class ChatTemplate:
    """A tokenizer's chat template, rendered by transformers itself, a row at a time.

    The end of an answer is found by rendering it once more with a mark behind it: a mark whose
    removal gives back the text stands where the answer ends, whatever the template does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(
        self, roles: tuple[str, ...], contents: Sequence[str], *, generate: bool = False
    ) -> str:
        """The rendered conversation, with the generation prompt if `generate`."""
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            words = str(error).strip() or type(error).__name__
            raise TemplateRefused(words.splitlines()[0][:120]) from error
        assert isinstance(text, str)
        return text

    def __call__(self, roles: tuple[str, ...], contents: Sequence[str]) -> Rendered:
        """Render a conversation.

        Raises:
            TemplateRefused: the template raised an error, or does not show an answer.
        """
        text = self.text(roles, contents)
        answers, differs = [], False
        for index, role in enumerate(roles):
            if role != "assistant":
                continue
            asked = self.text(roles[:index], contents[:index], generate=True)
            differs = not text.startswith(asked)
            start = self._mark(roles, contents, index, text, 0) if differs else len(asked)
            end = self._mark(roles, contents, index, text, 1)
            if start > end:
                raise TemplateRefused("the generation prompt is longer than the answer's turn")
            answers.append((start, end))
        return Rendered(text, answers, differs)

    def _mark(
        self, roles: tuple[str, ...], contents: Sequence[str], index: int, text: str, side: int
    ) -> int:
        """The position in `text` where a content begins (side 0) or ends (side 1)."""
        for content in (contents[index], contents[index].strip()):
            marked = content + MARK if side else MARK + content
            found = self.text(roles, [*contents[:index], marked, *contents[index + 1 :]])
            at = found.find(MARK)
            if at >= 0 and found[:at] + found[at + len(MARK) :] == text:
                return at
        raise TemplateRefused("the template does not show an answer as it is written")
