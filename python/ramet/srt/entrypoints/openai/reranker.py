"""Owns how a decoder ranks texts: its prompt for a query and a document, and the two tokens that it may answer with."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.configs.sentence_transformers import RerankerConfig, read_reranker
from ramet.srt.entrypoints.openai.serving_pooling import floats
from ramet.srt.errors import RequestError
from ramet.srt.text.chat_template import ChatTemplate
from ramet.srt.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Form = Callable[[str, str, str | None], dict[str, Any]]  # query, document and instruction to what a template is given
PROBES = ("first-probe-of-ramet", "second-probe-of-ramet", "third-probe-of-ramet")


def by_role(query: str, document: str, instruction: str | None) -> dict[str, Any]:
    """As sentence-transformers and vLLM have it: messages of the roles query and document, and system to instruct."""
    pair = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return {"messages": pair if instruction is None else [{"role": "system", "content": instruction}, *pair]}


def by_place(query: str, document: str, instruction: str | None) -> dict[str, Any]:
    """As SGLang has it: two messages of the role user; the instruction by itself."""
    pair = [{"role": "user", "content": query}, {"role": "user", "content": document}]
    return {"messages": pair, **({} if instruction is None else {"instruct": instruction})}


class Reranker:
    """A model that was declared to be one.

    Args:
        template: its chat template, which must show a query and a document.
    """

    def __init__(self, config: RerankerConfig, template: ChatTemplate | None):
        self.pooling = Pooling(label_token_ids=[config.true_token_id, config.false_token_id])
        self._template = template
        self._form: tuple[Form, bool] | None = None  # that the template takes, and whether with an instruction

    def prompts(self, query_of: Sequence[str], documents: Sequence[str], instruction: str | None) -> list[str]:
        """The prompt for each document and its query. Blocks: the template runs in a process of its own.

        Raises:
            RequestError: if the template refuses them, or is not one for a query and a document.
            ServiceError: if there is no process to run it in.
        """
        form, takes_instruction = self._form = self._form or self._find_form()
        if instruction is not None and not takes_instruction:
            raise RequestError("the model's chat template has no place for an instruction", param="instruction")
        return [
            self._render(form(query, document, instruction))
            for query, document in zip(query_of, documents, strict=True)
        ]

    def score(self, vector: bytes) -> float:
        """The probability, from 0 to 1, of the token for a relevant document if it must be one of the two.

        Args:
            vector: the log-probabilities that the pooling gives.
        """
        true, false = floats(vector)
        return 1 / (1 + math.exp(min(700.0, false - true)))  # beyond that exp is no number

    def _render(self, values: dict[str, Any]) -> str:
        if self._template is None:
            raise RequestError(
                "the model has no chat template, from which the prompt for a query and a document comes; start with "
                "--chat-template FILE",
                param="model",
            )
        return self._template.render(**values)

    def _find_form(self) -> tuple[Form, bool]:
        """What the template takes: tried with texts that it must show."""
        query, document, instruction = PROBES
        for form in (by_role, by_place):
            if self._shows(form(query, document, instruction), PROBES):
                return form, True
        if self._shows(by_role(query, document, None), (query, document)):
            return by_role, False
        raise RequestError(
            "the model's chat template doesn't show messages of the roles query and document; start with "
            "--chat-template FILE and the template of a reranker",
            param="model",
        )

    def _shows(self, values: dict[str, Any], texts: Sequence[str]) -> bool:
        if self._template is None:
            self._render(values)
        try:
            prompt = self._render(values)
        except RequestError as error:  # it wants other messages
            logger.debug("the chat template takes no %s: %s", list(values), error)
            return False
        return all(text in prompt for text in texts)


class NoReranker:
    """Stands for a model that ranks nothing.

    Args:
        reason: what requests that want ranks are told.
    """

    def __init__(self, reason: str):
        self.reason = reason


def find_reranker(folder: str, labels: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> Reranker | NoReranker:
    """How the model in `folder` ranks texts.

    Args:
        labels: the operator's, the one for an irrelevant document first; empty where the model's files count.

    Raises:
        ValueError: if a label is no token of the model.
    """
    if labels:
        false_id, true_id = (_token_id(label, tokenizer) for label in labels)
        config: RerankerConfig | None = RerankerConfig(true_token_id=true_id, false_token_id=false_id)
        where = "--classifier-from-token"
    else:
        where = "modules.json"
        try:
            config = read_reranker(folder)
        except ValueError as error:
            logger.warning("the model ranks nothing here: %s", error)
            return NoReranker(str(error))
    if config is None:
        return NoReranker(
            "the model that is served is no reranker: it has no modules.json with a LogitScore, and "
            "--classifier-from-token was not given"
        )
    if not all(0 <= token_id < vocab_size for token_id in (config.true_token_id, config.false_token_id)):
        raise ValueError(f"{where} names a token that the model with its vocabulary of {vocab_size} doesn't know")
    return Reranker(config, tokenizer.chat_template)


def _token_id(label: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(label, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"--classifier-from-token: {label!r} is not one token of the model's tokenizer, but {len(ids)}"
        )
    return ids[0]
