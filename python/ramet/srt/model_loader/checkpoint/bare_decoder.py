"""Owns the second spelling of names in checkpoints: those of a decoder that was saved without its output head.

transformers has a class for the decoder alone (Qwen3Model, say), whose names lack the "model." in front. Published
embedding models are saved from it.
"""

import re

BARE = re.compile(r"(embed_tokens|layers\.\d+|norm)\.")


def whole_name(name: str) -> str:
    """A tensor's name as a checkpoint with an output head has it."""
    return f"model.{name}" if BARE.match(name) else name
