"""Owns which of an output's tokens its content came from, however many of them come at once."""

from collections.abc import Sequence
from typing import Any

Token = dict[str, Any]  # an entry of OpenAI's log-probabilities; "bytes" are those of its text


class ContentTokens:
    """Give it the tokens, and the pieces of the output in order; it finds each piece's bytes among the tokens'.

    Marks that stand between pieces, and white space that is no content, are passed over.
    """

    def __init__(self) -> None:
        self._tokens: list[Token] = []  # that nobody has got
        self._text = b""  # of all tokens, without what is behind
        self._behind = 0  # bytes of the first token that are no longer in the text; negative: of one that was taken

    def add(self, tokens: Sequence[Token]) -> None:
        """Tokens that have come. Their text may come later."""
        self._tokens += tokens
        self._text += b"".join(bytes(one["bytes"]) for one in tokens)

    def skip(self, text: str) -> None:
        """A piece that is no content."""
        piece = text.encode()
        at = self._text.find(piece)
        self._pass(len(self._text) if at < 0 else at + len(piece))

    def take(self, text: str, *, is_next: bool, is_last: bool = False) -> list[Token]:
        """The tokens of a piece of content.

        Args:
            is_next: nothing but content came before it: what lies between is its own, such as tokens without a text.
            is_last: take the last such piece of text, not the first: what lies before it was not skipped.
        """
        piece = text.encode()
        at = self._text.rfind(piece) if is_last else self._text.find(piece)
        if at < 0:  # its text is not that of its tokens, as where bytes are no UTF-8
            at, piece = (0, self._text) if is_next else (max(len(self._text) - len(piece), 0), piece)
        if not is_next:
            self._pass(at)
            at = 0
        return self._pass(at + len(piece), splits=True)

    def rest(self) -> list[Token]:
        """All that nobody has got: at the end, tokens without a text."""
        return self._pass(len(self._text), splits=True)

    def _pass(self, num_bytes: int, *, splits: bool = False) -> list[Token]:
        """Go on in the text; the tokens that are behind then.

        Args:
            splits: whether a token is behind of which a part is.
        """
        self._text = self._text[num_bytes:]
        self._behind += num_bytes
        num_tokens = 0
        for token in self._tokens:
            size = len(token["bytes"])
            if self._behind < size and not (splits and self._behind > 0):
                break
            self._behind -= size
            num_tokens += 1
        passed, self._tokens = self._tokens[:num_tokens], self._tokens[num_tokens:]
        return passed
