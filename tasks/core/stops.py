"""The tokens that end an answer."""

from __future__ import annotations

from typing import Any

from tasks.core.tokens import TokenRows


def stop_ids(model: Any, tokenizer: Any, rows: TokenRows) -> frozenset[int]:
    """The ids that end an answer.

    Those that the model and its tokenizer name as end of sequence, and the special token with
    which the prepared answers end: an end of turn is often named nowhere but in the template.
    """
    found: set[int] = set()
    base: Any = getattr(model, "get_base_model", lambda: model)()
    for holder in (getattr(base, "generation_config", None), base.config):
        named = getattr(holder, "eos_token_id", None)
        found.update([named] if isinstance(named, int) else named or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    assert rows.answer_start is not None
    for index in range(len(rows)):
        learned = rows.row(index)[rows.answer_start[index] :]
        ends = [int(token) for token in learned if int(token) in special]
        found.update(ends[-1:])
    return frozenset(found)
