"""Owns the turning of a growing token sequence into a growing text that ends before its first stop string.

The scheduler, which stops at a stop string, and the detokenizer, which cuts it off, both use `TextStream`: they agree.
"""

from collections.abc import Sequence

from ramet.srt.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 5  # tokens that the next ones are decoded after: some tokenizers strip a text's leading space
PROMPT_TAIL_TOKENS = 16  # enough of a prompt to find a context in it that doesn't begin inside a character
MAX_HELD_TOKENS = 32  # a character has at most 4 bytes, so this many tokens without an end are no text
REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Decodes token by token: the pieces joined are the text of the whole, and no piece has half a character.

    Args:
        prompt_ids: the prompt, or its last PROMPT_TAIL_TOKENS.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = [self._prompt_context(prompt_ids)]  # pieces that each begin and end between two characters
        self._waiting: list[int] = []  # tokens that have not become text yet

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """The text that `token_ids` add. An unfinished character waits for its end, unless this is the `final` call."""
        self._waiting.extend(token_ids)
        if not self._waiting:
            return ""
        context_ids = [token_id for piece in self._context for token_id in piece]
        context = self._decode(context_ids)
        text = self._decode(context_ids + self._waiting)
        if text.endswith(REPLACEMENT) and not final and len(self._waiting) < MAX_HELD_TOKENS:
            return ""
        self._context.append(self._waiting)
        self._waiting = []
        num_tokens = sum(map(len, self._context))
        while num_tokens - len(self._context[0]) >= CONTEXT_TOKENS:
            num_tokens -= len(self._context.pop(0))
        return text[len(context) :]

    def _prompt_context(self, prompt_ids: Sequence[int]) -> list[int]:
        tail = list(prompt_ids[-PROMPT_TAIL_TOKENS:])
        for length in range(min(CONTEXT_TOKENS, len(tail)), len(tail)):
            if not self._decode(tail[-length:]).startswith(REPLACEMENT):
                return tail[-length:]
        return tail

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class TextStream:
    """The text of one output, released as far as no stop string can begin in it.

    A stop string counts when it ends in a token after the first `min_new_tokens`. Then `matched` is it, and nothing
    more is released.

    Args:
        keep_stop: release the stop string too (what follows it never is).
    """

    def __init__(
        self, decoder: IncrementalDecoder, stops: Sequence[str], min_new_tokens: int = 0, keep_stop: bool = False
    ):
        self.matched: str | None = None
        self._decoder = decoder
        self._stops = stops
        self._num_free_tokens = min_new_tokens
        self._keep_stop = keep_stop
        self._held = ""

    def push(self, token_ids: Sequence[int], final: bool = False) -> str:
        """The text that may be shown after `token_ids` have come; with `final` nothing but a stop is held back."""
        free, searched = token_ids[: self._num_free_tokens], token_ids[self._num_free_tokens :]
        self._num_free_tokens -= len(free)
        text = ""
        if free:
            self._held += self._decoder.push(free)
            place = len(self._held) - held_length(self._held, self._stops)
            text, self._held = self._held[:place], self._held[place:]
        return text + self._push_searched(searched, final)

    def _push_searched(self, token_ids: Sequence[int], final: bool) -> str:
        new = self._decoder.push(token_ids, final)
        if self.matched is not None:
            return ""
        self._held += new
        hit = find_stop(self._held, self._stops) if new else None
        if hit is not None:
            place, self.matched = hit
            return self._held[: place + len(self.matched) * self._keep_stop]
        place = len(self._held) if final else len(self._held) - held_length(self._held, self._stops)
        text, self._held = self._held[:place], self._held[place:]
        return text


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
