"""From a row to the text that the model reads, and where in it the answers stand.

    plain   prompt followed by completion
    chat    the model's own chat template

An answer begins where the text of its generation prompt ends, so that the model learns exactly
what it will be asked for, and ends where the row's own words end. What the template writes after
that (an end-of-turn token, white space) is looked at in tokens: `tasks/prepare/tokenize.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

Messages = list[dict[str, str]]

#: Marks a place in a rendered text. Private-use characters, which no template looks for.
MARK = "\ue0c1\uf8a3\ue0c1"


class TemplateRefused(Exception):
    """The template cannot show this conversation; args[0] says why in a few words."""


@dataclass(frozen=True)
class Rendered:
    """text, and the answers in it as [start, end) in characters, in order.

    prompt_differs: the template writes the last answer's turn otherwise than the generation
    prompt begins it, so that the model will be asked with another text than it has learned.
    """

    text: str
    answers: list[tuple[int, int]]
    prompt_differs: bool = False


def render_plain(prompt: str, completion: str) -> Rendered:
    return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))])


class ChatTemplate:
    """A tokenizer's chat template, rendered by transformers itself, a row at a time.

    The end of an answer is found by rendering it once more with a mark behind it: a mark whose
    removal gives back the text stands where the answer ends, whatever the template does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def _text(self, messages: Messages, *, generate: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TemplateRefused(str(error).splitlines()[0][:120] if str(error) else "") from error
        assert isinstance(text, str)
        return text

    def __call__(self, messages: Messages) -> Rendered:
        """Render a conversation.

        Raises:
            TemplateRefused: the template raised an error, or does not show an answer.
        """
        text = self._text(messages)
        answers, differs = [], False
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._text(messages[:index], generate=True) if index else ""
            differs = not (asked and text.startswith(asked))
            start = self._mark(messages, index, text, before=True) if differs else len(asked)
            end = self._mark(messages, index, text, before=False)
            if start > end:
                raise TemplateRefused("the generation prompt is longer than the answer's turn")
            answers.append((start, end))
        return Rendered(text, answers, differs)

    def _mark(self, messages: Messages, index: int, text: str, *, before: bool) -> int:
        """The position in `text` where the content of a message begins or ends."""
        content = messages[index]["content"]
        for bare in (content, content.strip()):
            marked = MARK + bare if before else bare + MARK
            changed = [*messages]
            changed[index] = {**messages[index], "content": marked}
            found = self._text(changed)
            at = found.find(MARK)
            if at >= 0 and found[:at] + found[at + len(MARK) :] == text:
                return at
        raise TemplateRefused("the template does not show an answer as it is written")
