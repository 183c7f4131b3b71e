"""Owns the following of one JSON value (RFC 8259) through a text that comes in pieces: where it ends or breaks."""

import json
import re

STRING_RUN = re.compile(r'[^"\\\x00-\x1f]+')
SPACES = re.compile(r"[ \t\n\r]+")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
NUMBER_RUN = re.compile(r"[-+.0-9eE]+")
HEX = frozenset("0123456789abcdefABCDEF")
WORDS = ("true", "false", "null")


class JsonText:
    """Reads one value that begins with the first character. No white space may come before it."""

    def __init__(self) -> None:
        self.is_done = False
        self.is_bad = False
        self._open: list[str] = []  # "}" or "]" of what the place is in
        self._wanted = "value"  # or "key", "colon", "next"; "first": a value or key, or the end of what just began
        self._in_string = False
        self._is_key = False
        self._escape = ""  # what of an escape in a string has come
        self._lexeme = ""  # what of a number or word has come

    def take(self, text: str, at: int) -> tuple[int, str]:
        """Read on from place `at`: the place behind what was read, and that as strict JSON.

        At the end of the value `is_done`, before a character that can't come next `is_bad`.
        """
        pieces: list[str] = []
        while at < len(text) and not (self.is_done or self.is_bad):
            if self._in_string:
                at = self._take_in_string(text, at, pieces)
            elif self._lexeme:
                at = self._take_in_lexeme(text, at, pieces)
            elif found := SPACES.match(text, at) if self._open else None:
                pieces.append(found.group())
                at = found.end()
            elif self._take_sign(text[at]):
                pieces.append(text[at])
                at += 1
        return at, "".join(pieces)

    def _take_in_string(self, text: str, at: int, pieces: list[str]) -> int:
        sign = text[at]
        if self._escape:
            is_hex = self._escape != "\\"
            if sign not in (HEX if is_hex else '"\\/bfnrtu'):
                self.is_bad = True
                return at
            self._escape += sign
            if len(self._escape) == 6 or (len(self._escape) == 2 and sign != "u"):
                self._escape = ""
        elif found := STRING_RUN.match(text, at):
            pieces.append(found.group())
            return found.end()
        elif sign == "\\":
            self._escape = sign
        elif sign == '"':
            self._in_string = False
            if self._is_key:
                self._wanted = "colon"
            else:
                self._end_value()
        else:  # models write line breaks as they are
            sign = json.dumps(sign)[1:-1]
        pieces.append(sign)
        return at + 1

    def _take_in_lexeme(self, text: str, at: int, pieces: list[str]) -> int:
        sign = text[at]
        is_number = self._lexeme[0] in "-0123456789"
        if is_number and (found := NUMBER_RUN.match(text, at)):
            self._lexeme += found.group()
            pieces.append(found.group())
            return found.end()
        if is_number:
            if NUMBER.fullmatch(self._lexeme) is None:
                self.is_bad = True
            else:
                self._lexeme = ""
                self._end_value()
            return at
        self._lexeme += sign
        if not any(word.startswith(self._lexeme) for word in WORDS):
            self.is_bad = True
            return at
        if self._lexeme in WORDS:
            self._lexeme = ""
            self._end_value()
        pieces.append(sign)
        return at + 1

    def _take_sign(self, sign: str) -> bool:
        """Take a character between strings, numbers and words; False, and is_bad, if it can't come next."""
        wanted, closing = self._wanted, self._open[-1] if self._open else ""
        if sign == closing and wanted in ("first", "next"):
            self._open.pop()
            self._end_value()
        elif sign == "," and wanted == "next":
            self._wanted = "key" if closing == "}" else "value"
        elif sign == ":" and wanted == "colon":
            self._wanted = "value"
        elif sign == '"' and (wanted == "key" or (wanted == "first" and closing == "}")):
            self._in_string = self._is_key = True
        elif wanted == "value" or (wanted == "first" and closing == "]"):
            return self._begin_value(sign)
        else:
            self.is_bad = True
        return not self.is_bad

    def _begin_value(self, sign: str) -> bool:
        if sign in "{[":
            self._open.append("}" if sign == "{" else "]")
            self._wanted = "first"
        elif sign == '"':
            self._in_string, self._is_key = True, False
        elif sign in "-0123456789tfn":
            self._lexeme = sign
        else:
            self.is_bad = True
        return not self.is_bad

    def _end_value(self) -> None:
        self._wanted = "next"
        self.is_done = not self._open
