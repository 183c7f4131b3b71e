"""Owns how the tokens that the files beside tokenizer.json declare get into a tokenizer: with the same ids and flags as
transformers 5 gives them, or not at all."""

from typing import Any

from tokenizers import AddedToken, Tokenizer

from ramet.srt.configs.tokenizer_config import SPECIAL_TOKEN_NAMES, extra_tokens, named_tokens


def token_of_role(config: dict[str, Any]) -> dict[str, str]:
    """Role -> token: {"bos_token": "<s>", …}, the model's own roles too."""
    return {name: token["content"] for name, token in named_tokens(config).items()}


def add_declared_tokens(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Add what `config` declares beyond tokenizer.json: first the tokens with ids, then roles, then the others.

    Raises:
        ValueError: if a token would not get the id that it is declared with.
    """
    declared = config.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder()
    wanted = {int(token_id): token for token_id, token in declared.items()}
    roles, extra = named_tokens(config), extra_tokens(config)
    role_texts = {token["content"] for token in roles.values()}
    new = []
    for token_id, fields in sorted(wanted.items()):
        if fields.get("legacy") and token_id in known:
            continue  # tokenizer.json knows better than added_tokens.json
        token = _added_token(fields, special=fields["content"] in role_texts)
        if token_id not in known or _flags(known[token_id]) != _flags(token):
            new.append(token)
    texts = {token.content for token in (*known.values(), *new)}
    by_text = {fields["content"]: fields for fields in wanted.values()}
    lately: set[str] = set()  # such a token loses its flags where it comes again as a bare text
    for fields in (*roles.values(), *extra):
        content, is_bare = fields["content"], len(fields) == 1
        if content in texts and not (is_bare and content in lately):
            continue
        new.append(_added_token(by_text.get(content, fields), special=is_bare or content in role_texts))
        lately = lately - {content} if content in texts else lately | {content}
        texts.add(content)
    if new:
        backend.add_tokens(new)
    _check_ids(backend, wanted)
    _mark_roles(backend, config)


def _mark_roles(backend: Tokenizer, config: dict[str, Any]) -> None:
    """A token with one of the usual roles is special even where the file that adds it doesn't say so."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name, fields in named_tokens(config).items():
        token = known.get(fields["content"])
        if name in SPECIAL_TOKEN_NAMES and token is not None and not token.special:
            backend.add_special_tokens([AddedToken(token.content, **(_flags(token) | {"special": True}))])


def _check_ids(backend: Tokenizer, wanted: dict[int, dict[str, Any]]) -> None:
    for token_id, fields in wanted.items():
        if backend.token_to_id(fields["content"]) != token_id:
            file = "added_tokens.json" if fields.get("legacy") else "tokenizer_config.json"
            raise ValueError(f"{file}: added token {fields['content']!r} can't get the id {token_id}; the tokenizer "
                             f"gives it {backend.token_to_id(fields['content'])}")  # fmt: skip


def _added_token(fields: dict[str, Any], special: bool) -> AddedToken:
    """The token with its flags; one that needn't have been called special is so with `special`."""
    flags = {name: value for name, value in fields.items() if name not in ("content", "legacy")}
    if len(fields) == 1:  # a bare text
        return AddedToken(fields["content"], special=special)
    token = AddedToken(fields["content"], **flags)
    token.special = token.special or special
    return token


def _flags(token: AddedToken) -> dict[str, bool]:
    return {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
