"""Which tokens of a row are learned: answers, found by their characters, and their stop token.

A text is always tokenised whole, as the model will meet it. A token that spans the border between
prompt and answer belongs to the answer, and is counted: the prompt alone ends in another token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tasks.prepare.render import Rendered

#: Tokens after an answer within which the template's end-of-turn token is looked for.
CLOSING_TOKENS = 8

Span = tuple[int, int]


class Unfit(Exception):
    """A row that cannot be used; args[0] is the reason code."""


@dataclass(frozen=True)
class Rules:
    """What the tokenizer and the recipe say.

    add_special: whether the tokenizer adds its own BOS and the like (a chat template writes them).
    suffix: how many special tokens it then adds after a text.
    bos: kept where a prompt is cut from the left. stops: tokens at which generation ends.
    eos: the stop token that is appended where the text ends without one.
    """

    max_length: int
    on_overflow: Literal["refuse", "truncate"]
    add_special: bool
    suffix: int
    bos: int | None = None
    stops: frozenset[int] = frozenset()
    eos: int = -1


@dataclass
class Counts:
    """Rows (open_answers: answers) that are worth a word in the report or aloud."""

    truncated: int = 0
    merged_borders: int = 0
    eos_appended: int = 0
    open_answers: int = 0
    prompts_differ: int = 0


def causal_row(
    encoding: Any, rendered: Rendered, rules: Rules, counts: Counts
) -> tuple[list[int], list[Span]]:
    """The tokens of a row up to its last learned token, and the spans that are learned.

    Raises:
        Unfit: too long, or no token of an answer is left.
    """
    ids: list[int] = encoding.ids
    last = len(ids) - rules.suffix if rules.add_special else len(ids)
    spans, closed, merged = [], False, False
    for answer in rendered.answers:
        if spans and not closed:
            counts.open_answers += 1
        span, straddles = answer_tokens(encoding, rendered.text, answer, last)
        merged = merged or straddles
        stop = stop_after(ids, span[1], rules.stops)
        closed = stop is not None
        spans.append((span[0], span[1] if stop is None else stop))
    start, end = spans[-1]
    ids = ids[:end]
    if not closed:
        ids.append(rules.eos)
        spans[-1] = start, end + 1
        counts.eos_appended += 1
    if len(ids) > rules.max_length:
        ids, spans = cut_prompt(ids, spans, rules)
        counts.truncated += 1
    counts.merged_borders += merged
    counts.prompts_differ += rendered.prompt_differs
    return ids, spans


def answer_tokens(
    encoding: Any, text: str, answer: tuple[int, int], last: int
) -> tuple[Span, bool]:
    """The tokens of the characters of an answer, and whether the first holds prompt as well."""
    start_char, end_char = answer
    start = token_at(encoding, start_char, end_char)
    if start is None:
        raise Unfit("no_answer_token")
    end = token_at(encoding, end_char, len(text))
    if end is None:
        end = last
    elif encoding.token_to_chars(end)[0] < end_char:
        end += 1
    return (start, end), encoding.token_to_chars(start)[0] < start_char


def token_at(encoding: Any, char: int, limit: int) -> int | None:
    """The first token at or after a character, below `limit`: a dropped character has none."""
    while char < limit:
        token: int | None = encoding.char_to_token(char)
        if token is not None:
            return token
        char += 1
    return None


def stop_after(ids: list[int], end: int, stops: frozenset[int]) -> int | None:
    """The position behind the stop token that closes an answer, or None."""
    for position in range(end, min(end + CLOSING_TOKENS, len(ids))):
        if ids[position] in stops:
            return position + 1
    return None


def cut_prompt(ids: list[int], spans: list[Span], rules: Rules) -> tuple[list[int], list[Span]]:
    """Cut a row's prompt from the left, but for its BOS. An answer is never cut.

    An earlier answer of a chat that the cut goes through stays as prompt and is not learned.
    """
    head = ids[:1] if ids[0] == rules.bos else []
    cut = len(ids) - (rules.max_length - len(head))
    # The first token of an answer is learned from the token before it: one must remain.
    first = cut if head else cut + 1
    if rules.on_overflow == "refuse" or spans[-1][0] < first:
        raise Unfit(f"too_long:{len(ids)}")
    moved = [
        (start - cut + len(head), end - cut + len(head)) for start, end in spans if start >= first
    ]
    return head + ids[cut:], moved


def cut_text(ids: list[int], rules: Rules, counts: Counts) -> list[int]:
    """A text for classification, or of the retention rows: cut from the right where allowed."""
    if len(ids) <= rules.max_length:
        return ids
    if rules.on_overflow == "refuse":
        raise Unfit(f"too_long:{len(ids)}")
    counts.truncated += 1
    return ids[: rules.max_length - rules.suffix] + ids[len(ids) - rules.suffix :]
