"""Owns the turning of a growing token sequence into a growing text that ends before its first stop string.

The scheduler, which stops at a stop string, and the detokenizer, which cuts it off, both use `TextStream`: they agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ramet.srt.text.clean_up import CleanUp
from ramet.srt.text.tokenizer import Tokenizer

PROMPT_TAIL_TOKENS = 16  # what `prompt_tail` keeps
REPLACEMENT = "\ufffd"


class Piece(NamedTuple):
    """A piece of an output: text, or a special token's text that is not shown."""

    text: str
    is_hidden: bool = False


def prompt_tail(tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> list[int]:
    """What an output's decoder must know of the prompt: its last PROMPT_TAIL_TOKENS that are shown."""
    tail: list[int] = []
    for token_id in reversed(prompt_ids):
        if len(tail) == PROMPT_TAIL_TOKENS:
            break
        if _shown(tokenizer, token_id, skip_special_tokens):
            tail.append(token_id)
    return tail[::-1]


def _shown(tokenizer: Tokenizer, token_id: int, skip_special_tokens: bool) -> str | None:
    """The token; None if there is none, or it is not shown."""
    return None if skip_special_tokens and tokenizer.is_special(token_id) else tokenizer.token(token_id)


class IncrementalDecoder:
    """Decodes token by token: the pieces joined are the text of the whole, and no piece has half a character.

    Args:
        prompt_ids: the prompt, or its `prompt_tail`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._boundaries = tokenizer.boundaries()
        self._clean_up: CleanUp | None = None
        self._context: list[int] = []  # stands for all that was shown: the next tokens are decoded behind it
        self._context_len: int | None = None  # of its text, once that was needed
        self._waiting: list[int] = []  # shown tokens that have not become text yet
        self._hidden: list[Piece] = []  # special tokens behind them
        num_settled = 0
        for token_id in prompt_tail(tokenizer, prompt_ids, skip_special_tokens):
            self._take(token_id)
            num_settled = num_settled if self._boundaries.is_open else len(self._waiting)
        self._flush(num_settled)
        self._set_context([*self._context, *self._waiting])  # a prompt may end in half a character
        self._waiting = []
        if tokenizer.cleans_up:
            self._clean_up = CleanUp()

    def hides(self, stop: str) -> bool:
        """Whether `stop` has the text of a special token that is not shown."""
        return self._skip_special_tokens and self._tokenizer.holds_special_token(stop)

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """The text that `token_ids` add. An unfinished character waits for its end, unless this is the `final` call."""
        return "".join(piece.text for piece in self.push_pieces(token_ids, final) if not piece.is_hidden)

    def push_pieces(self, token_ids: Sequence[int], final: bool = False) -> list[Piece]:
        """As `push`, with the special tokens that are not shown between the pieces of text."""
        pieces: list[Piece] = []
        num_settled = 0  # of the waiting tokens: what follows can't change their text
        for token_id in token_ids:
            if self._take(token_id):
                num_settled = num_settled if self._boundaries.is_open else len(self._waiting)
            elif self._skip_special_tokens and self._tokenizer.is_special(token_id):
                pieces += self._flush(num_settled)
                num_settled = 0
                hidden = Piece(self._tokenizer.token(token_id) or "", is_hidden=True)
                (self._hidden if self._waiting else pieces).append(hidden)
        pieces += self._flush(len(self._waiting) if final else num_settled)
        if final and self._clean_up is not None:
            pieces.append(Piece(self._clean_up.push("", final=True)))
        return pieces

    def pending(self) -> list[Piece]:
        """What would come if the text ended here, up to half a character at its end."""
        whole = self._decode_behind_context(self._waiting)
        text = whole.rstrip(REPLACEMENT)
        if self._clean_up is not None:
            text = self._clean_up.peek(text)
        return [Piece(text), *([] if whole.endswith(REPLACEMENT) else self._hidden)] if text else []

    def _take(self, token_id: int) -> bool:
        """Whether the token is shown; then it waits."""
        token = _shown(self._tokenizer, token_id, self._skip_special_tokens)
        if token is None:
            return False
        self._waiting.append(token_id)
        self._boundaries.take(token)
        return True

    def _flush(self, num_tokens: int) -> list[Piece]:
        """The text of the first waiting tokens, and the special tokens behind them."""
        if not num_tokens:
            return []
        text = self._decode_behind_context(self._waiting[:num_tokens])
        if self._clean_up is not None:
            text = self._clean_up.push(text)
        self._waiting = self._waiting[num_tokens:]
        anchors = (self._tokenizer.anchor_id, self._tokenizer.broken_byte_id)
        self._set_context([anchor for anchor in anchors[: 1 + self._boundaries.is_broken_run] if anchor is not None])
        hidden, self._hidden = self._hidden, []
        return [Piece(text), *hidden]

    def _decode_behind_context(self, token_ids: Sequence[int]) -> str:
        if not token_ids:
            return ""
        if self._context_len is None:
            self._context_len = len(self._tokenizer.decode_raw(self._context)) if self._context else 0
        return self._tokenizer.decode_raw([*self._context, *token_ids])[self._context_len :]

    def _set_context(self, token_ids: list[int]) -> None:
        if token_ids != self._context:
            self._context, self._context_len = token_ids, None


class TextStream:
    """The text of one output, released as far as no stop string can begin in it.

    A stop string counts when it ends in a token after the first `min_new_tokens`. Then `matched` is it, and nothing
    more is released. One that has a special token's text is looked for among the special tokens too, where these are
    not shown.

    Args:
        keep_stop: release the stop string too (what follows it never is).
    """

    def __init__(
        self, decoder: IncrementalDecoder, stops: Sequence[str], min_new_tokens: int = 0, keep_stop: bool = False
    ):
        self.matched: str | None = None
        self._decoder = decoder
        self._held = HeldText(stops, [stop for stop in stops if decoder.hides(stop)])
        self._num_free_tokens = min_new_tokens
        self._keep_stop = keep_stop

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """The text that may be shown after `token_ids` have come; with `final` nothing but a stop is held back."""
        free, searched = token_ids[: self._num_free_tokens], token_ids[self._num_free_tokens :]
        self._num_free_tokens -= len(free)
        text = ""
        if free:
            self._held.add(self._decoder.push_pieces(free))
            text = self._held.release()
        return text + self._push_searched(searched, final)

    def _push_searched(self, token_ids: Sequence[int], final: bool) -> str:
        new = self._decoder.push_pieces(token_ids, final)
        if self.matched is not None:
            return ""
        self._held.add(new)
        hit = self._held.find() if new else None
        if hit is None and token_ids and self._held.stops:  # in a character or word that seems to be complete
            hit = self._held.find(self._decoder.pending())
        if hit is not None:
            self.matched = hit.stop
            return hit.text_through if self._keep_stop else hit.text_before
        return self._held.release(everything=final)


class Hit(NamedTuple):
    """A stop string that was found, and the shown text before it and with it."""

    text_before: str
    text_through: str
    stop: str


class HeldText:
    """Text that is not released yet, with the hidden tokens in it where a stop string may need them.

    Args:
        special_stops: those of `stops` that have a hidden token's text.
    """

    def __init__(self, stops: Sequence[str], special_stops: Sequence[str]):
        self.stops = stops
        self._plain_stops = [stop for stop in stops if stop not in special_stops]
        self._special_stops = special_stops
        self._pieces: list[Piece] = []

    def add(self, pieces: Sequence[Piece]) -> None:
        """Append what an IncrementalDecoder gives."""
        self._pieces += [piece for piece in pieces if piece.text and (self._special_stops or not piece.is_hidden)]

    def release(self, everything: bool = False) -> str:
        """Remove and return what no stop string can begin in, or all."""
        shown, full = _shown_text(self._pieces), ""
        if everything or not self.stops:
            self._pieces = []
            return shown
        place = len(shown) - held_length(shown, self._plain_stops)
        num_full = 0
        if self._special_stops:
            full = "".join(piece.text for piece in self._pieces)
            num_full = len(full) - held_length(full, self._special_stops)
            place = min(place, _num_shown(self._pieces, num_full))
        self._drop(place, num_full)
        return shown[:place]

    def find(self, more: Sequence[Piece] = ()) -> Hit | None:
        """The stop string that begins first, the longest if several begin there; `more` counts as if it had come."""
        pieces = [*self._pieces, *more]
        shown = _shown_text(pieces)
        found = find_stop(shown, self._plain_stops)
        hits = [] if found is None else [(found[0], found[0] + len(found[1]), found[1])]
        if self._special_stops:
            found = find_stop("".join(piece.text for piece in pieces), self._special_stops)
            if found is not None:
                begin, end = (_num_shown(pieces, place) for place in (found[0], found[0] + len(found[1])))
                hits.append((begin, end, found[1]))
        if not hits:
            return None
        begin, end, stop = min(hits, key=lambda hit: (hit[0], -len(hit[2])))
        return Hit(shown[:begin], shown[:end], stop)

    def _drop(self, num_shown: int, num_full: int) -> None:
        """Forget the first shown characters, and the hidden tokens that end within the first `num_full` of all."""
        left, place = [], 0
        for piece in self._pieces:
            place += len(piece.text)
            if piece.is_hidden:
                if place > num_full:
                    left.append(piece)
                continue
            rest = piece.text[num_shown:]
            num_shown = max(0, num_shown - len(piece.text))
            if rest:
                left.append(Piece(rest))
        self._pieces = left


def _shown_text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces if not piece.is_hidden)


def _num_shown(pieces: Sequence[Piece], num_full: int) -> int:
    """How many of the first `num_full` characters are shown."""
    num_shown = 0
    for piece in pieces:
        part = min(len(piece.text), num_full)
        num_full -= part
        num_shown += 0 if piece.is_hidden else part
    return num_shown


def find_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Place and value of the stop string that begins first in `text`; the longest if several begin there."""
    found = [(place, stop) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, key=lambda hit: (hit[0], -len(hit[1])), default=None)


def held_length(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` could be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
