"""The places of byte-level tokens are those that the tokenizer itself would tell."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tasks.prepare.locate import byte_tokens

TOKENIZER = Tokenizer.from_file(
    str(Path(__file__).parents[3] / "recipes" / "quickstart" / "base" / "tokenizer.json")
)
WORDS = st.sampled_from(
    [*"abc 1\n\u00e9\u4e2d\U0001f600\u00ad", "  ", "refund", "<|user|>", "<|end|>"]
)


@pytest.mark.parametrize("add_special", [False, True])
@given(st.lists(WORDS, max_size=30).map("".join))
def test_places_are_the_tokenizers_own(add_special, text):
    table = byte_tokens(TOKENIZER, add_special=add_special, suffix=0)
    expected = TOKENIZER.encode(text, add_special_tokens=add_special)
    ids = TOKENIZER.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
    row = table.locate(ids, text)
    assert row.ids == expected.ids
    for char in range(len(text) + 2):
        assert row.char_to_token(char) == expected.char_to_token(char)
    for token in range(int(add_special), len(ids)):
        assert row.token_to_chars(token)[0] == expected.token_to_chars(token)[0] or (
            # Of a character's later bytes the tokenizer says the character's end.
            len(text[row.token_to_chars(token)[0]].encode()) > 1
        )


def test_a_text_that_the_tokenizer_changes_is_not_located():
    """NFC joins an accent with its letter: the tokens are no longer the text."""
    table = byte_tokens(TOKENIZER, add_special=False, suffix=0)
    text = "cafe\u0301"
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert table.locate(ids, text) is None
    assert table.locate(TOKENIZER.encode("caf\u00e9", add_special_tokens=False).ids, "caf\u00e9")


def test_a_tokenizer_of_words_has_no_byte_table():
    words = Tokenizer(models.WordLevel({"\u2581a": 0, "b": 1}, unk_token="b"))
    assert byte_tokens(words, add_special=False, suffix=0) is None
