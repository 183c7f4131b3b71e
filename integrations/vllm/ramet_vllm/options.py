"""Owns the options in --model-loader-extra-config: what they may be, and the load configuration that they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.modelexpress_config import parse_address
from ramet.srt.utils.net import SeedAddress, reachable_host, split_address
from ramet.srt.weights.version import DEFAULT_VERSION, check_version

FLAG = "--model-loader-extra-config"
CHOICES = {
    "backend": ("transfer_engine", "nccl"),
    "local_mode": ("auto", "map", "copy", "off"),
    "fallback": ("disk", "error"),
}
DIGEST_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user says of where the weights come from. Names and meanings are those of Ramet's own flags."""

    seeds: tuple[SeedAddress, ...] = ()
    modelexpress: str | None = None  # the metadata server that knows the seeds, where none is given
    modelexpress_wait_s: float = 600.0
    model_name: str | None = None  # what the weights go by there; None: the served name
    timeout_s: float = 60.0
    api_key: str | None = None  # read from a file: vLLM logs its arguments
    ssl_ca_certs: str | None = None
    backend: str = "transfer_engine"
    local_mode: str = "auto"
    fallback: str = "disk"
    host: str = "0.0.0.0"
    weights_digest: str | None = None
    weight_version: str = DEFAULT_VERSION

    @classmethod
    def parse(cls, given: Any) -> "Options":
        """Raises ValueError, with what was expected, if `given` is not sound."""
        if not isinstance(given, dict):
            raise ValueError(f'{FLAG} must be a JSON object such as {{"seed": "host:port"}}; got {given!r}')
        unknown = sorted(set(given) - set(_READERS))
        if unknown:
            raise ValueError(f"{FLAG}: unknown {', '.join(map(repr, unknown))}; known are {', '.join(_READERS)}")
        if ("seed" in given) == ("modelexpress" in given):
            raise ValueError(
                f'{FLAG} must name a seed, {{"seed": "host:port"}}, or a metadata server, '
                '{"modelexpress": "host:port"}'
            )
        if "seed" in given and (surplus := {"modelexpress_wait", "model_name"} & set(given)):
            raise ValueError(f"{FLAG}: {min(surplus)} goes together with modelexpress alone")
        values: dict[str, Any] = {}
        for name, value in given.items():
            field, read = _READERS[name]
            values[field] = read(f"{FLAG}: {name}", value)
        named = [name for name in ("weights_digest", "weight_version") if given.get(name, "files") != "files"]
        if named and values.setdefault("fallback", "error") == "disk":
            raise ValueError(
                f'{FLAG}: vLLM reads files without a look at their {named[0]}: say "fallback": "error", or leave it out'
            )
        return cls(**values)

    def load_config(self) -> LoadConfig:
        """The same for Ramet's loader, which leaves files to vLLM."""
        return LoadConfig(
            load_format="remote_instance",
            seeds=self.seeds,
            backend=self.backend,
            local_mode=self.local_mode,
            fallback="error",
            timeout_s=self.timeout_s,
            host=reachable_host(self.host),
            ssl_ca_certs=self.ssl_ca_certs,
            api_keys=() if self.api_key is None else (self.api_key,),
            weights_digest=self.weights_digest,
            # What it names are strangers until they have proved what they hold: they see no key.
            shows_keys=self.modelexpress is None,
            modelexpress_url=self.modelexpress,
        )


def _read_seeds(name: str, value: Any) -> tuple[SeedAddress, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be an address, or a list of them; got {value!r}")
    parts = [part.strip() for text in texts for part in text.split(",")]
    seeds = []
    for part in parts:
        scheme, _, address = part.rpartition("://")
        if scheme not in ("", "http", "https"):
            raise ValueError(f"{name} must be host:port, http://host:port or https://host:port; got {part!r}")
        seeds.append(SeedAddress(*split_address(address.rstrip("/"), name), scheme or "http"))
    return tuple(dict.fromkeys(seeds))


def _read_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
        raise ValueError(f"{name} must be seconds, above 0 and at most 86400; got {value!r}")
    return float(value)


def _read_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text; got {value!r}")
    return value


def _read_server(name: str, value: Any) -> str:
    return parse_address(_read_text(name, value), name)


def _read_file(name: str, value: Any) -> str:
    path = _read_text(name, value)
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: can't read {path}: {error}") from None


def _read_key(name: str, value: Any) -> str:
    key = _read_file(name, value).strip()
    if not key or not key.isprintable() or " " in key:
        raise ValueError(f"{name}: {value} must hold one key in one line")
    return key


def _read_certificates(name: str, value: Any) -> str:
    _read_file(name, value)
    return str(value)


def _read_choice(name: str, value: Any) -> str:
    choices = CHOICES[name.rpartition(" ")[2]]
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return str(value)


def _read_digest(name: str, value: Any) -> str:
    if value == "files":
        return str(value)
    text = _read_text(name, value)
    if len(text) != DIGEST_CHARS or set(text) - set("0123456789abcdef"):
        raise ValueError(f"{name} must be {DIGEST_CHARS} hex digits in lower case, or files; got {value!r}")
    return text


def _read_version(name: str, value: Any) -> str:
    try:
        return check_version(_read_text(name, value))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


_READERS = {  # option: the field that it fills, and how it is read
    "seed": ("seeds", _read_seeds),
    "modelexpress": ("modelexpress", _read_server),
    "modelexpress_wait": ("modelexpress_wait_s", _read_seconds),
    "model_name": ("model_name", _read_text),
    "timeout": ("timeout_s", _read_seconds),
    "api_key_file": ("api_key", _read_key),
    "ssl_ca_certs": ("ssl_ca_certs", _read_certificates),
    "backend": ("backend", _read_choice),
    "local_mode": ("local_mode", _read_choice),
    "fallback": ("fallback", _read_choice),
    "host": ("host", _read_text),
    "weights_digest": ("weights_digest", _read_digest),
    "weight_version": ("weight_version", _read_version),
}
