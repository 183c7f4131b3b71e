"""Owns where adapters are said to be: folders, hub ids and other instances, as flags and requests write it."""

import json
from dataclasses import dataclass

import msgspec

from ramet.srt.lora.adapter import LoraAdapter, LoraFile, LoraSeed, LoraSource, check_lora_name
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, get_from_seed
from ramet.srt.observability.logs import escape_text
from ramet.srt.utils.hub import resolve_model_path
from ramet.srt.utils.net import SeedAddress, format_address, split_address
from ramet.srt.utils.outside_json import decode_json

INSTANCE_SCHEMES = {"instance://": "http", "instance+https://": "https"}
LIST_PATH = "/remote_instance_lora_adapters"


@dataclass(frozen=True)
class LoraPath:
    """An adapter to load."""

    name: str  # "" for all adapters of an instance, by their names there
    path: str
    pinned: bool = False
    is_listed: bool = False  # the instance, at a metadata server; see LoraSeed


class ListedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that an instance has."""

    adapter: LoraAdapter
    pinned: bool = False


class AdapterList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to GET /remote_instance_lora_adapters."""

    adapters: list[ListedAdapter]


def parse_lora_path(text: str) -> LoraPath:
    """What one value of --lora-paths says: NAME=PATH, a path that is its own name, or a JSON object.

    Raises:
        ValueError: if it says nothing sound.
    """
    if text.lstrip().startswith("{"):
        return _parse_object(text)
    name, sign, path = text.partition("=")
    if not sign or "/" in name:
        name, path = ("" if instance_address(text) else text), text
    if not path:
        raise ValueError(f"--lora-paths takes NAME=PATH; got {text!r}")
    if name or not instance_address(path):
        check_lora_name(name)
    return LoraPath(name, path)


def _parse_object(text: str) -> LoraPath:
    try:
        values = json.loads(text)
        name = values.pop("lora_name", None) or values.pop("name")
        path = values.pop("lora_path", None) or values.pop("path")
        pinned = values.pop("pinned", False) or False
        values.pop("base_model_name", None)
        if values or not isinstance(name, str) or not isinstance(path, str) or not isinstance(pinned, bool):
            raise ValueError("it has other fields, or of other types")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"--lora-paths takes JSON objects with lora_name, lora_path and pinned; got {text[:200]!r}: {error}"
        ) from None
    return LoraPath(check_lora_name(name), path, pinned)


def instance_address(path: str) -> tuple[SeedAddress, str] | None:
    """The instance that a path names, and the adapter's name there if it says one; None for a folder or hub id.

    Raises:
        ValueError: if the address is none.
    """
    for prefix, scheme in INSTANCE_SCHEMES.items():
        if path.startswith(prefix):
            address, _, name = path.removeprefix(prefix).partition("/")
            host, port = split_address(address, "the instance of an adapter")
            return SeedAddress(host, port, scheme), name
    return None


def instance_path(address: SeedAddress) -> str:
    """A path that names an instance."""
    prefix = next(prefix for prefix, scheme in INSTANCE_SCHEMES.items() if scheme == address.scheme)
    return prefix + format_address(address.host, address.port)


def read_folder(path: LoraPath) -> tuple[LoraAdapter, LoraSource]:
    """An adapter in a folder, or on the hub. Raises ValueError if it is none, or can't be used."""
    from ramet.srt.lora.adapter_files import find_adapter_file, read_adapter  # with numpy, for the digest

    folder = resolve_model_path(path.path, what="adapter")
    return read_adapter(path.name, folder), LoraFile(path=find_adapter_file(folder))


def ask_instance(server: SeedServer, timeout_s: float) -> list[ListedAdapter]:
    """The adapters that an instance gives away.

    Raises:
        ValueError: if it does not say; the message tells why.
    """
    try:
        status, body = get_from_seed(server, LIST_PATH, timeout_s)
        if status != 200:
            text = escape_text(body[:300].decode("utf-8", "replace").strip())
            raise ValueError(f"it answers HTTP {status} to {LIST_PATH}: {text}")
        return decode_json(body, AdapterList).adapters
    except (OSError, ValueError) as error:
        raise ValueError(f"no adapters from the instance {server.name}: {error}") from error


def choose_listed(
    listed: list[ListedAdapter], server: SeedServer, there: str, path: LoraPath
) -> tuple[LoraAdapter, LoraSource]:
    """One of an instance's adapters.

    Args:
        there: its name there.
        path: with the name that it gets here.

    Raises:
        ValueError: if the instance does not have it.
    """
    found = next((one.adapter for one in listed if one.adapter.name == there), None)
    if found is None:
        raise ValueError(f"the instance {server.name} has no adapter {there!r}")
    address = server.address
    source = LoraSeed(scheme=address.scheme, host=address.host, port=address.port, name=there, is_listed=path.is_listed)
    return msgspec.structs.replace(found, name=check_lora_name(path.name)), source
