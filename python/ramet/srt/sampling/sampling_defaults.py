"""Owns the sampling parameters that a model recommends, in its generation_config.json: defaults of its requests."""

import logging
import os
from typing import Any

from ramet.srt.configs.tokenizer_config import read_optional_json
from ramet.srt.errors import RequestError
from ramet.srt.sampling.sampling_params import parse_sampling_params

FILE = "generation_config.json"
USED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # as SGLang
# Read elsewhere, or of no consequence for what an answer says.
OTHERS_BUSINESS = frozenset(
    {"eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache",
     "_from_model_config", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
     "output_logits", "cache_implementation", "trust_remote_code"}
)  # fmt: skip

logger = logging.getLogger(__name__)


def read_sampling_defaults(folder: str, vocab_size: int) -> dict[str, Any]:
    """The defaults that the model in `folder` has for sampling parameters; {} without the file. Says what it ignores.

    Raises:
        ValueError: if a value is none that the parameter can have; the message names the file and the key.
    """
    config = read_optional_json(folder, FILE)
    defaults = {name: config[name] for name in USED if config.get(name) is not None}
    for name, value in defaults.items():
        try:
            parse_sampling_params({name: value}, vocab_size)
        except RequestError as error:
            raise ValueError(f"{os.path.join(folder, FILE)}: {error} (--sampling-defaults openai ignores it)") from None
    ignored = sorted(name for name, value in config.items() if value is not None and name not in OTHERS_BUSINESS)
    ignored = [name for name in ignored if name not in USED]
    if defaults or ignored:
        shown = ", ".join(f"{name} {value}" for name, value in defaults.items()) or "none"
        logger.info("sampling defaults of %s: %s; ignored: %s", FILE, shown, ", ".join(ignored) or "nothing")
    return defaults
