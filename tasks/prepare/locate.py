"""Where the tokens of a byte-level tokenizer stand in a text, found from the tokens alone.

`tokenizers` tracks the place of every token while it encodes, which costs a fifth of its time.
A byte-level token is a string of bytes, so if those of a row put end to end are the text itself,
each token stands where the lengths before it add up to. A row for which they are not (the
tokenizer normalised it, or left something out) is encoded once more, with places.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, Protocol


class Located(Protocol):
    """What `tasks.prepare.spans` asks of a row's encoding, as `tokenizers.Encoding` answers it."""

    @property
    def ids(self) -> list[int]: ...

    def char_to_token(self, char: int) -> int | None: ...

    def token_to_chars(self, token: int) -> tuple[int, int] | None: ...


class ByteRow:
    """A row's tokens and where in bytes each ends. ends: of the text's tokens, after `prefix`."""

    __slots__ = ("_data", "_ends", "_prefix", "_text", "ids")

    def __init__(
        self, ids: list[int], text: str, data: bytes, ends: list[int], prefix: int
    ) -> None:
        self.ids = ids
        self._text, self._data, self._ends, self._prefix = text, data, ends, prefix

    def char_to_token(self, char: int) -> int | None:
        if char >= len(self._text):
            return None
        plain = len(self._data) == len(self._text)
        place = char if plain else len(self._text[:char].encode())
        return self._prefix + bisect_right(self._ends, place)

    def token_to_chars(self, token: int) -> tuple[int, int] | None:
        at = token - self._prefix
        if not 0 <= at < len(self._ends):
            return None
        start = self._ends[at - 1] if at else 0
        return self._char(start), self._char(self._ends[at])

    def _char(self, place: int) -> int:
        if len(self._data) == len(self._text):
            return place
        # A token may begin inside a character: then it is that character's.
        return len(self._data[:place].decode(errors="ignore"))


class ByteTokens:
    """The bytes of every token of a byte-level tokenizer.

    prefix, suffix: special tokens that it puts around a text.
    """

    def __init__(self, table: list[bytes], prefix: int, suffix: int) -> None:
        self._table, self._prefix, self._suffix = table, prefix, suffix
        self._lengths = [len(token) for token in table]

    def locate(self, ids: list[int], text: str) -> ByteRow | None:
        """The places of a row's tokens, or None: the tokens are not the text."""
        inner = ids[self._prefix : len(ids) - self._suffix]
        data = text.encode()
        if b"".join(map(self._table.__getitem__, inner)) != data:
            return None
        ends = list(accumulate(map(self._lengths.__getitem__, inner)))
        return ByteRow(ids, text, data, ends, self._prefix)


def byte_tokens(tokenizer: Any, *, add_special: bool, suffix: int) -> ByteTokens | None:
    """The byte table of a `tokenizers.Tokenizer`, or None: it is not byte-level.

    suffix: special tokens that it puts behind a text.
    """
    added = {
        number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    alphabet = _alphabet()
    table = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        if number in added:
            table[number] = added[number].encode()
        elif all(char in alphabet for char in token):
            table[number] = bytes(alphabet[char] for char in token)
        else:
            return None
    around = tokenizer.encode("", add_special_tokens=add_special).ids
    return ByteTokens(table, len(around) - suffix, suffix)


def _alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes stand for themselves, the others for the
    characters from U+0100 on, in order (GPT-2, Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
