"""Owns where a model's chat template comes from: a file that was asked for, the folder's own files, or its config."""

import glob
import json
import os
from typing import Any

from ramet.srt.configs.tokenizer_config import CONFIG, named_tokens, read_optional_json
from ramet.srt.text.chat_template import ChatTemplate

DEFAULT, TOOL_USE = "default", "tool_use"
FILE, MORE_FILES = "chat_template.jinja", "additional_chat_templates"


def read_chat_template(folder: str, config: dict[str, Any], template_file: str | None = None) -> ChatTemplate | None:
    """The template of `template_file`, else of the folder's own files, else of tokenizer_config.json, `config`.

    A model may have several templates by name: "default", and "tool_use" for chats with tools.

    Raises:
        ValueError: if a file can't be read or an entry is no template; the message names the file.
    """
    sources, origin = _find_sources(folder, config, template_file)
    if not sources:
        return None
    if DEFAULT not in sources:
        known = ", ".join(sorted(sources))
        words = f"{origin} has {known} and none called {DEFAULT}; name the file of one with --chat-template"
        sources[DEFAULT] = f"{{{{ raise_exception({json.dumps(words)}) }}}}"
    special_tokens = {name: token["content"] for name, token in named_tokens(config).items()}
    return ChatTemplate(sources[DEFAULT], special_tokens, origin, sources.get(TOOL_USE))


def _find_sources(folder: str, config: dict[str, Any], template_file: str | None) -> tuple[dict[str, str], str]:
    """Name -> template, and the file that they come from."""
    if template_file is not None:
        return {DEFAULT: _read(template_file)}, template_file
    own = os.path.join(folder, FILE)
    sources = {DEFAULT: _read(own)} if os.path.isfile(own) else {}
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), MORE_FILES, "*.jinja"))):
        sources[os.path.basename(file).removesuffix(".jinja")] = _read(file)
    if sources:
        return sources, own
    for name in (CONFIG, "chat_template.json"):
        value = (config if name == CONFIG else read_optional_json(folder, name)).get("chat_template")
        if value:
            file = os.path.join(folder, name)
            return _named(value, file), file
    return {}, own


def _named(value: Any, file: str) -> dict[str, str]:
    """Name -> template, from one template or a list of {"name": …, "template": …}."""
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value.items() if isinstance(value, dict) else []
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        entries = [(entry.get("name"), entry.get("template")) for entry in value]
    if not entries or not all(isinstance(name, str) and isinstance(source, str) for name, source in entries):
        raise ValueError(f"{file}: 'chat_template' must be a text, or a list of objects with 'name' and 'template'")
    return dict(entries)


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as stream:
            return stream.read()
    except (OSError, ValueError) as error:
        raise ValueError(f"the chat template {file} can't be read: {error}") from None
