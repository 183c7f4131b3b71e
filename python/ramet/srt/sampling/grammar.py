"""Owns constrained output: from a regex, a JSON schema or a grammar to the set of tokens that may come next.

It knows nothing of logits: the scheduler applies the mask. `llguidance` is imported when first needed.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.errors import RequestError
from ramet.srt.sampling.sampling_params import GRAMMAR_FIELDS, SamplingParams
from ramet.srt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CACHED_GRAMMARS = 128
# Between the parts of a JSON text. Bounded, so that a model that likes white space still reaches the end.
JSON_WHITESPACE = r"[ \n\t]{0,20}"


def grammar_source(params: SamplingParams) -> str | None:
    """The request's constraint as llguidance's own grammar text; None when its output is free.

    Raises:
        RequestError: (a ValueError) if the constraint can't be read; it names the parameter.
    """
    for name in GRAMMAR_FIELDS:
        text = getattr(params, name)
        if text is not None:
            try:
                return _to_llguidance(name, text)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{name} can't be used: {_first_line(error)}", param=name) from None
    return None


def check_grammar(params: SamplingParams) -> None:
    """Find out without a tokenizer whether the request's constraint can be compiled.

    Raises:
        RequestError: if it can't; it names the parameter.
    """
    source = grammar_source(params)
    if source is None:
        return
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(source)
    if is_error:
        raise _unusable(params, messages[0])


class GrammarBackend:
    """Compiles constraints for one tokenizer and keeps the last ones. `compile` may be called from several threads.

    llguidance's form of the tokenizer takes up to a second to make: it is made with the first constraint.

    Args:
        vocab_size: the model's, which may be above the tokenizer's.
        eos_ids: the tokens that may end a complete output.
    """

    def __init__(self, get_tokenizer: Callable[[], Tokenizer], vocab_size: int, eos_ids: Sequence[int]):
        if not eos_ids:
            raise ValueError("constrained output needs a model with an end-of-sequence token")
        self.eos_ids = tuple(eos_ids)
        self.vocab_size = vocab_size
        self._get_tokenizer = get_tokenizer
        self._ll_tokenizer: Any = None
        self._matchers: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: SamplingParams) -> "Grammar | None":
        """The request's constraint at its start; None when its output is free.

        Raises:
            RequestError: (a ValueError) if the constraint can't be compiled; it names the parameter.
        """
        source = grammar_source(params)
        if source is None:
            return None
        with self._lock:
            matcher = self._matchers.get(source)
        if matcher is None:
            from llguidance import LLMatcher

            matcher = LLMatcher(self._make_ll_tokenizer(), source, log_level=0)
            if matcher.is_error():
                raise _unusable(params, matcher.get_error())
        with self._lock:
            self._matchers[source] = matcher
            self._matchers.move_to_end(source)
            if len(self._matchers) > CACHED_GRAMMARS:
                self._matchers.popitem(last=False)
        return Grammar(matcher.deep_copy(), self.eos_ids)

    def _make_ll_tokenizer(self) -> Any:
        with self._lock:
            if self._ll_tokenizer is None:
                from llguidance import LLTokenizer

                self._ll_tokenizer = LLTokenizer(
                    self._get_tokenizer().to_json(self.vocab_size),
                    n_vocab=self.vocab_size,
                    eos_token=list(self.eos_ids),
                )
            return self._ll_tokenizer


class Grammar:
    """Where one sequence stands in its constraint."""

    def __init__(self, matcher: Any, eos_ids: tuple[int, ...]):
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._ended = False

    def fill_mask(self, row: "npt.NDArray[np.int32]") -> None:
        """Write which tokens may come next into `row`: int32 [ceil(vocab_size / 32)], lowest bit first.

        Once the output is complete only the end-of-sequence tokens are allowed.

        Raises:
            RuntimeError: if the matcher gave up (a resource limit); the sequence can't go on.
        """
        if self._ended:
            row[:] = 0
            for token_id in self._eos_ids:
                row[token_id // 32] |= _bit(token_id % 32)
            return
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False, and nothing changes, when the constraint doesn't allow it.

        Raises:
            RuntimeError: if the matcher gave up (a resource limit); the sequence can't go on.
        """
        if self._ended:
            return token_id in self._eos_ids
        if self._matcher.try_consume_tokens([token_id]) != 1:
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
        twin = Grammar(self._matcher.deep_copy(), self._eos_ids)
        twin._ended = self._ended
        return twin

    def _end_if_stopped(self) -> bool:
        self._ended = self._matcher.is_stopped()
        return self._ended

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"constrained output can't go on: {_first_line(self._matcher.get_error())}")


def make_grammar_backend(
    name: str, get_tokenizer: Callable[[], Tokenizer], model_config: ModelConfig
) -> GrammarBackend | None:
    """The backend that --grammar-backend names; None if constrained output is off, or the model has no end token."""
    if name == "none" or not model_config.eos_token_ids:
        return None
    return GrammarBackend(get_tokenizer, model_config.vocab_size, model_config.eos_token_ids)


def _to_llguidance(name: str, text: str) -> str:
    from llguidance import LLMatcher, grammar_from

    if name == "json_schema":
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": JSON_WHITESPACE})
    if name == "regex":
        return LLMatcher.grammar_from_regex(text)
    return grammar_from("ebnf", text)  # GBNF (root ::= …) or Lark (start: …)


def _unusable(params: SamplingParams, message: str) -> RequestError:
    name = next(name for name in GRAMMAR_FIELDS if getattr(params, name) is not None)
    return RequestError(f"{name} can't be used: {_first_line(message)}", param=name)


def _first_line(error: object) -> str:
    return str(error).strip().split("\n", 1)[0]


def _bit(position: int) -> int:
    """The int32 whose bit `position` alone is set."""
    return 1 << position if position < 31 else -(1 << 31)
