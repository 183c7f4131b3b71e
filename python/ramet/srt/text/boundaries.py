"""Owns where the text of a growing token sequence may be cut: where nothing that follows changes what is before."""

import codecs
from typing import Protocol

MAX_HELD_BYTES = 32  # bytes in a row that are held although they are text so far: what follows could make them none


class Boundaries(Protocol):
    """Looks at each token that is shown.

    `is_open` says whether what follows can still change the text up to here, `is_broken_run` whether the last token
    belongs to a run of bytes that is no text.
    """

    is_open: bool
    is_broken_run: bool

    def take(self, token: str) -> None:
        """The next token, as the vocabulary has it."""


class NoBoundaries:
    """For decoders that turn each token into text by itself."""

    is_open = False
    is_broken_run = False

    def take(self, token: str) -> None:
        pass


class CharacterBoundaries:
    """For byte-level tokens: a character of several bytes may be spread over several tokens."""

    is_broken_run = False

    def __init__(self, byte_of_character: dict[str, int]) -> None:
        self.is_open = False
        self._bytes_of = byte_of_character
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: str) -> None:
        self._decoder.decode(byte_level_bytes(token, self._bytes_of))
        self.is_open = bool(self._decoder.getstate()[0])


class ByteRunBoundaries:
    """For tokens like <0xE6> between others: a run of them is text only if the whole of it is UTF-8.

    A run that can't become text any more is shown at once; a longer one than MAX_HELD_BYTES as far as it is text.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.is_broken_run = False
        self._length = 0

    def take(self, token: str) -> None:
        byte = fallback_byte(token)
        if byte is None:
            self.is_open = self.is_broken_run = False
            self._length = 0
            self._decoder.reset()
            return
        self._length += 1
        try:
            self._decoder.decode(bytes([byte]))
        except UnicodeDecodeError:
            self.is_broken_run = True
            self._decoder.reset()
        unfinished = bool(self._decoder.getstate()[0])
        self.is_open = not self.is_broken_run and (unfinished or self._length < MAX_HELD_BYTES)


class LastTokenBoundaries:
    """For decoders that treat the last token of a text otherwise: it stays open until the next one comes."""

    is_open = True
    is_broken_run = False

    def take(self, token: str) -> None:
        pass


def byte_level_bytes(token: str, byte_of_character: dict[str, int]) -> bytes:
    """What a byte-level decoder makes of a token: one byte for each character, or UTF-8 if one is of no byte."""
    try:
        return bytes(byte_of_character[character] for character in token)
    except KeyError:
        return token.encode()


def fallback_byte(token: str) -> int | None:
    """The byte that a token like "<0xE6>" stands for; None for every other token."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
