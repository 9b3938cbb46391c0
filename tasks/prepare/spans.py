"""Which tokens of a row are learned: answers, found by their characters, and their stop token.

A text is always tokenised whole, as the model will meet it. A token that spans the border between
prompt and answer belongs to the answer, and is counted: the prompt alone ends in another token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tasks.prepare.locate import Located
from tasks.prepare.render import Rendered

#: Tokens after an answer within which the template's end-of-turn token is looked for.
CLOSING_TOKENS = 8

Span = tuple[int, int]
Value = TypeVar("Value")


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
    """Rows (open_answers: answers) that are worth a word aloud."""

    merged_borders: int = 0
    eos_appended: int = 0
    open_answers: int = 0
    prompts_differ: int = 0


def causal_row(
    encoding: Located, rendered: Rendered, rules: Rules, counts: Counts
) -> tuple[list[int], list[Span], bool]:
    """The tokens of a row up to its last learned token, what is learned, whether it was cut.

    Raises:
        Unfit: too long, or no token of an answer is left.
    """
    ids: list[int] = encoding.ids
    last = len(ids) - rules.suffix
    spans: list[Span] = []
    closed, merged = True, False
    for start_char, end_char in rendered.answers:
        if not closed:
            counts.open_answers += 1
        start = token_at(encoding, start_char, end_char)
        if start is None:
            raise Unfit("no_answer_token")
        if begins(encoding, start) < start_char:
            merged = True
        end = token_at(encoding, end_char, len(rendered.text))
        if end is None:
            end = last
        elif ids[end] not in rules.stops and begins(encoding, end) < end_char:
            end += 1
        stop = stop_after(encoding, ids, end, rendered.text, end_char, rules.stops)
        closed = stop is not None
        spans.append((start, end if stop is None else stop))
    if closed:
        ids = ids[: spans[-1][1]]
    else:
        start, end = spans[-1]
        ids = [*ids[:end], rules.eos]
        spans[-1] = start, end + 1
        counts.eos_appended += 1
    truncated = len(ids) > rules.max_length
    if truncated:
        ids, spans = cut_prompt(ids, spans, rules)
    counts.merged_borders += merged
    counts.prompts_differ += rendered.prompt_differs
    return ids, spans, truncated


def pair_row(source: Any, target: Any, rules: Rules) -> tuple[list[int], list[Span], bool]:
    """The tokens of a prompt and, behind them, of its completion; what is learned, which is all of
    the completion with its stop token; and whether the prompt was cut.

    Each is as the tokenizer writes a text by itself, and each has `max_length` for itself: an
    encoder and a decoder do not share positions. A completion is never cut.

    Args:
        source, target: encodings of the `tokenizers` library.

    Raises:
        Unfit: too long, or no token on either side.
    """
    if not source.ids:
        raise Unfit("empty_prompt")
    if len(target.ids) <= sum(target.special_tokens_mask):
        raise Unfit("no_answer_token")
    ids, cut = cut_text(source.ids, rules)
    answer = target.ids if target.ids[-1] in rules.stops else [*target.ids, rules.eos]
    if len(answer) > rules.max_length:
        raise Unfit(f"too_long:{len(answer)}")
    return [*ids, *answer], [(len(ids), len(ids) + len(answer))], cut


def token_at(encoding: Located, char: int, limit: int) -> int | None:
    """The first token at or after a character, below `limit`: a dropped character has none."""
    token: int | None = None
    while char < limit and (token := encoding.char_to_token(char)) is None:
        char += 1
    return token


def begins(encoding: Located, token: int) -> int:
    """The character at which a token of the text begins."""
    place = encoding.token_to_chars(token)
    assert place is not None, "a special token stands nowhere in the text"
    return place[0]


def stop_after(
    encoding: Located, ids: list[int], end: int, text: str, char: int, stops: frozenset[int]
) -> int | None:
    """The position behind the stop token that closes an answer, or None.

    Between the answer and its stop token there may be white space, which is then learned as well.
    """
    for position, token in enumerate(ids[end : end + CLOSING_TOKENS], start=end):
        if token in stops:
            place = None if position == end else encoding.token_to_chars(position)
            between = text[char : place[0]] if place else ""
            return None if between.strip() else position + 1
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


def cut_text(ids: list[int], rules: Rules) -> tuple[list[int], bool]:
    """A text of classification or retention, from the right cut to max_length, and whether."""
    if len(ids) <= rules.max_length:
        return ids, False
    if rules.on_overflow == "refuse":
        raise Unfit(f"too_long:{len(ids)}")
    return shortened(ids, rules), True


def shortened(values: list[Value], rules: Rules) -> list[Value]:
    """What stands for the tokens that are left of a row that was cut."""
    return values[: rules.max_length - rules.suffix] + values[len(values) - rules.suffix :]
