"""Owns how a stranger's text is shown: in one line, without what a terminal or a log would take for its own."""

MAX_LEN = 300  # characters


def printable(text: str, max_len: int = MAX_LEN) -> str:
    """The text with everything escaped that is not printable, line ends above all; cut where it is too long."""
    shown = text if len(text) <= max_len else f"{text[:max_len]}…"
    if shown.isprintable():
        return shown
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)
