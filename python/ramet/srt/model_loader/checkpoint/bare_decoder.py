"""Owns the spellings of names in checkpoints: those of a decoder by itself, and those of one that is a part of a model.

transformers has a class for the decoder alone (Qwen3Model, say), whose names lack the "model." in front. Published
embedding models are saved from it. Models for text and pictures have their text model under "language_model".
"""

import re

BARE = re.compile(r"(embed_tokens|layers\.\d+|norm)\.")
PART = re.compile(r"(model\.language_model|language_model\.model)\.|language_model\.(?=lm_head\.)")


def whole_name(name: str) -> str:
    """A tensor's name as a checkpoint of a text model with an output head has it."""
    if match := PART.match(name):
        return name[match.end() :] if name.startswith("lm_head.", match.end()) else f"model.{name[match.end() :]}"
    return f"model.{name}" if BARE.match(name) else name
