"""Owns constrained output as llguidance does it: from a constraint to the set of tokens that may come next.

It runs in the grammar processes only (managers/grammar_process.py): the library recurses, computes and allocates as the
constraint wants. `llguidance` is imported when first needed.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ramet.srt.sampling.constraint import Constraint
from ramet.srt.text.json_schema import adapt_schema
from ramet.srt.text.output_format import ANSWER
from ramet.srt.text.tokenizer import Tokenizer
from ramet.srt.text.tool_calls.lark import JSON_WHITESPACE

MAX_REASON_CHARS = 200

Result = TypeVar("Result")


class GrammarError(ValueError):
    """The library can't use a constraint, or can't go on with it. One line."""


class GrammarCompiler:
    """Compiles constraints for one tokenizer. llguidance's form of that takes up to a second to make.

    Args:
        vocab_size: the model's, which may be above the tokenizer's.
        eos_ids: the tokens that may end a complete output.

    Raises:
        GrammarError: if the library can't use the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        from llguidance import LLTokenizer

        self.eos_ids = tuple(eos_ids)
        self.num_mask_bytes = 4 * -(-vocab_size // 32)
        text = tokenizer.to_json(vocab_size)
        self._tokenizer = call_library(lambda: LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_ids)))

    def compile(self, constraint: Constraint) -> "Grammar":
        """The constraint at its start.

        Raises:
            GrammarError: if it can't be compiled.
        """
        return call_library(lambda: self._compile(constraint))

    def _compile(self, constraint: Constraint) -> "Grammar":
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, _to_llguidance(constraint), log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return Grammar(matcher, self.eos_ids, self.num_mask_bytes)


class Grammar:
    """Where one sequence stands in its constraint."""

    def __init__(self, matcher: Any, eos_ids: tuple[int, ...], num_mask_bytes: int):
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._num_mask_bytes = num_mask_bytes
        self._ended = False

    def mask(self) -> bytes:
        """Which tokens may come next: one bit each, in int32 words, lowest bit first.

        Once the output is complete only the end-of-sequence tokens are allowed.

        Raises:
            GrammarError: if none may, or the matcher gave up (a resource limit); the sequence can't go on.
        """
        if self._ended:
            return self._only_end()
        mask: bytes = call_library(self._matcher.compute_bitmask)
        self._check()
        if not any(mask):
            raise GrammarError("nothing can follow, and the output is not complete")
        return mask

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False, and nothing changes, when the constraint doesn't allow it.

        Raises:
            GrammarError: if the matcher gave up (a resource limit); the sequence can't go on.
        """
        if self._ended:
            return token_id in self._eos_ids
        if call_library(lambda: self._matcher.try_consume_tokens([token_id])) != 1:
            self._check()
            return token_id in self._eos_ids and self._end_if_stopped()
        if token_id in self._eos_ids:
            self._ended = True
        return True

    @property
    def is_terminated(self) -> bool:
        """Whether the output is complete and nothing but an end-of-sequence token can follow."""
        return self._ended or self._matcher.is_stopped()

    def copy(self) -> "Grammar":
        """An independent grammar at the same place."""
        twin = Grammar(call_library(self._matcher.deep_copy), self._eos_ids, self._num_mask_bytes)
        twin._ended = self._ended
        return twin

    def _only_end(self) -> bytes:
        mask = bytearray(self._num_mask_bytes)
        for token_id in self._eos_ids:
            mask[token_id // 8] |= 1 << token_id % 8
        return bytes(mask)

    def _end_if_stopped(self) -> bool:
        self._ended = self._matcher.is_stopped()
        return self._ended

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_reason(self._matcher.get_error()))


def call_library(call: Callable[[], Result]) -> Result:
    """What `call`, into llguidance, returns.

    Raises:
        GrammarError: whatever it raises: a panic of its Rust code is no Exception.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GrammarError):
        raise
    except BaseException as error:  # noqa: BLE001 - pyo3's PanicException derives from BaseException alone
        raise GrammarError(_reason(error) or type(error).__name__) from None


def _to_llguidance(constraint: Constraint) -> str:
    """The library's form of it: Lark, or a list of grammars as JSON, of which the first counts."""
    rest = _rest_to_llguidance(constraint.name, constraint.text)
    if not constraint.before:
        return rest
    answer = json.loads(rest)["grammars"][0] if rest.startswith("{") else {"lark_grammar": rest}
    return json.dumps({"grammars": [{"lark_grammar": constraint.before}, {**answer, "name": ANSWER}]})


def _rest_to_llguidance(name: str, text: str) -> str:
    from llguidance import LLMatcher, grammar_from

    if name == "json_schema":
        return LLMatcher.grammar_from_json_schema(adapt_schema(text), defaults={"whitespace_pattern": JSON_WHITESPACE})
    if name == "regex":
        return LLMatcher.grammar_from_regex(text)
    return grammar_from("ebnf", text)  # GBNF (root ::= …) or Lark (start: …)


def _reason(error: object) -> str:
    """The library's words in one line. A regex parser's are several: the last one says what is wrong."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    if lines[0].startswith("NoExtension"):
        return "no output can satisfy it"
    wrong = [line for line in lines[1:] if line.startswith("error:")]
    return " ".join([lines[0][:MAX_REASON_CHARS], *wrong[:1]])[: 2 * MAX_REASON_CHARS]
