"""Owns the value of --modelexpress-config and the address of the metadata server."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

from ramet.srt.utils.net import format_address

DEFAULT_PORT = 8001
DEFAULT_ADDRESS = f"localhost:{DEFAULT_PORT}"
TRANSPORTS = ("transfer_engine",)
FLAG = "--modelexpress-config"
ADDRESS_VARIABLES = ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS")
EMBEDDED = "embedded"
EMBEDDED_PORT = 8001


@dataclass(frozen=True, kw_only=True)
class ModelExpressConfig:
    """The value of --modelexpress-config. What is None is taken from the engine."""

    url: str | None = None  # host:port of the metadata server
    source: bool | None = None  # True: this instance is a seed and never takes its weights from another one
    transport: str = "transfer_engine"
    model_name: str | None = None
    tp_size: int | None = None
    pp_size: int | None = None
    ep_size: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    wait_timeout: float = 600.0  # seconds to wait for a source that is starting, or for whoever reads the files

    def __post_init__(self) -> None:
        hints = get_type_hints(ModelExpressConfig)
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), hints[field.name])
        if self.transport not in TRANSPORTS:
            raise ValueError(f"{FLAG} transport must be one of {', '.join(TRANSPORTS)}; got {self.transport!r}")
        for name in ("url", "model_name", "dtype"):
            if getattr(self, name) == "":
                raise ValueError(f"{FLAG} {name} must not be empty; leave it out to take the engine's")
        for name in ("tp_size", "pp_size", "ep_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{FLAG} {name} must be at least 1; got {value}")
        if not 0 <= self.wait_timeout < math.inf:
            raise ValueError(f"{FLAG} wait_timeout must be a number of seconds; got {self.wait_timeout}")
        if self.is_embedded and embedded_port(self.url) is None:
            raise ValueError(f"{FLAG} url must be {EMBEDDED} or {EMBEDDED}:PORT; got {self.url!r}")
        if self.url is not None and not self.is_embedded:
            parse_address(self.url, f"{FLAG} url")

    @property
    def is_embedded(self) -> bool:
        """Whether the instance runs the metadata server itself."""
        return self.url is not None and self.url.split(":")[0] == EMBEDDED

    def check_sizes(self, **sizes: int) -> None:
        """Raise ValueError, naming the key, if a size here is not the engine's.

        Args:
            sizes: tp_size, pp_size and ep_size of the engine.
        """
        for name, real in sizes.items():
            wanted = getattr(self, name)
            if wanted is not None and wanted != real:
                raise ValueError(f"{FLAG} {name} is {wanted}, but the engine runs with {real}")

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError when a config value has another type than its field; true is no integer here."""
    allowed = get_args(hint) or (hint,)
    if float in allowed:
        allowed = (*allowed, int)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join("null" if t is type(None) else t.__name__ for t in get_args(hint) or (hint,))
        raise ValueError(f"{FLAG} {name} must be {wanted}; got {value!r}")


def parse_modelexpress_config(text: str | None) -> ModelExpressConfig:
    """The configuration in a JSON object, or in the JSON file whose path `text` is; the defaults for None.

    Raises:
        ValueError: naming the key that is unknown, comes twice or has a bad value, or saying what is not JSON.
    """
    if text is None:
        return ModelExpressConfig()
    if not text.strip():
        raise ValueError(f"{FLAG} must not be empty; leave it out to take all defaults")
    where = ""
    if not text.lstrip().startswith("{"):
        try:
            where, text = f" in {text}", Path(text).read_text()
        except OSError as error:
            raise ValueError(f"{FLAG} must be a JSON object or the path of a JSON file: {error}") from None
    try:
        values = json.loads(text, object_pairs_hook=lambda pairs: dict_of_pairs(pairs, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{FLAG}: this is not JSON{where}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{FLAG} must be a JSON object{where}; got {values!r}")
    known = [field.name for field in fields(ModelExpressConfig)]
    if unknown := [key for key in values if key not in known]:
        raise ValueError(f"{FLAG}: unknown key {unknown[0]!r}{where}; known are {', '.join(known)}")
    return ModelExpressConfig(**values)


def dict_of_pairs(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that comes twice: one of the values would be ignored."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{FLAG}: the key {twice!r} comes twice{where}")
    return values


def embedded_port(url: str | None) -> int | None:
    """The port in "embedded:PORT", 8001 for "embedded"; None if it is neither."""
    name, _, port = (url or "").partition(":")
    if name != EMBEDDED:
        return None
    if not port:
        return None if ":" in str(url) else EMBEDDED_PORT
    return int(port) if port.isascii() and port.isdigit() and int(port) < 65535 else None


def resolve_address(url: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """host:port of the metadata server: `url`, else MODEL_EXPRESS_URL, else MX_SERVER_ADDRESS, else localhost:8001.

    Raises:
        ValueError: if it is no address; the message says where it comes from.
    """
    if url:
        return parse_address(url, "the address of the ModelExpress server")
    for name in ADDRESS_VARIABLES:
        if environ.get(name):
            return parse_address(environ[name], f"the environment variable {name}")
    return DEFAULT_ADDRESS


def parse_address(text: str, what: str) -> str:
    """host:port in an address with or without http(s):// and port.

    Raises:
        ValueError: if it is none; the message begins with `what`.
    """
    address = text.removeprefix("http://").removeprefix("https://").rstrip("/")
    try:
        parts = urlsplit(f"//{address}")
        port = DEFAULT_PORT if parts.port is None else parts.port
        is_whole = address.lower() == parts.netloc.lower() and "@" not in address and not address.endswith(":")
    except ValueError:
        port, is_whole = 0, False
    if not is_whole or not parts.hostname or not port or any(character.isspace() for character in address):
        raise ValueError(f"{what} must be host:port, the port from 1 to 65535; got {text!r}")
    return format_address(parts.hostname, port)
