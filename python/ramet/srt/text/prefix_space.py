"""Owns `add_prefix_space` of tokenizer_config.json: it may say something else than tokenizer.json does."""

import json
import logging
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

# The classes of transformers that give it to their byte-level pre-tokenizer, whatever tokenizer.json has there.
BYTE_LEVEL_CLASSES = frozenset({"GPT2Tokenizer", "Qwen2Tokenizer", "CohereTokenizer", "GPTNeoXTokenizer"})

logger = logging.getLogger(__name__)


def apply_prefix_space(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Do as transformers 5 does for the class that `config` names; say so where tokenizer.json is followed instead."""
    wanted = config.get("add_prefix_space")
    if not isinstance(wanted, bool):
        return
    pre_tokenizer, normalizer = (_state(part) for part in (backend.pre_tokenizer, backend.normalizer))
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") in BYTE_LEVEL_CLASSES:
        for place, part in enumerate(parts):
            if part.get("type") == "ByteLevel":
                whole: Any = backend.pre_tokenizer
                (whole if isinstance(whole, ByteLevel) else whole[place]).add_prefix_space = wanted
    prepends = any(part.get("type") == "Prepend" for part in normalizer.get("normalizers", [normalizer]))
    if not wanted and (prepends or any(part.get("prepend_scheme", "never") != "never" for part in parts)):
        logger.warning("tokenizer_config.json says add_prefix_space false; tokenizer.json adds it, and is followed")


def _state(component: Any) -> dict[str, Any]:
    """A normalizer or pre-tokenizer as tokenizer.json has it; {} for none."""
    return {} if component is None else json.loads(component.__getstate__())
