"""Owns the cleaning of text that some tokenizers ask for (`clean_up_tokenization_spaces`): no space before punctuation.

The list is that of transformers, in its order.
"""

REPLACEMENTS = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
                (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


def clean_up(text: str) -> str:
    """`text` without the spaces that stand before punctuation and contracted words."""
    for found, replacement in REPLACEMENTS:
        text = text.replace(found, replacement)
    return text


class CleanUp:
    """Cleans a text that comes in pieces: the joined results are the whole cleaned at once."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str, final: bool = False) -> str:
        """What can be said of the text so far; the last word waits for what follows it."""
        self._held += text
        place = len(self._held) if final else _last_safe_cut(self._held)
        done, self._held = self._held[:place], self._held[place:]
        return clean_up(done)

    def peek(self, text: str) -> str:
        """What would come if the text ended with `text`."""
        return clean_up(self._held + text)


def _last_safe_cut(text: str) -> int:
    """The last place that no replacement reaches across: before the first space behind a word."""
    place = len(text)
    while (place := text.rfind(" ", 0, place)) > 0:
        before = text[:place]
        if not before.endswith((" ", " '", " n")):
            return place
    return 0
