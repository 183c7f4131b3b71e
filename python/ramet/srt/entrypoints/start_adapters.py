"""Owns which adapters an instance has from its start on: what the flags name, and what its seeds have."""

import dataclasses
import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from ramet.srt.configs.lora_config import DEFAULT_MAX_RANK
from ramet.srt.errors import RequestError
from ramet.srt.lora.adapter_paths import LoraPath, instance_address, parse_lora_path, read_folder
from ramet.srt.managers.lora_control import LoraControl
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import SeedAddress

logger = logging.getLogger(__name__)


def read_lora_paths(args: ServerArgs) -> tuple[list[LoraPath], ServerArgs]:
    """Find out what is wrong with adapters before anything takes memory.

    Returns:
        Those that the flags name, and the flags with a --max-lora-rank that is large enough for those in folders.

    Raises:
        ValueError: if a folder holds none, or one that is not supported.
    """
    paths = [parse_lora_path(text) for text in args.lora_paths]
    names = [path.name for path in paths if path.name]
    if len(set(names)) < len(names) or not set(names).isdisjoint(args.model_names):
        raise ValueError("--lora-paths: each adapter needs a name of its own, which is not the model's")
    ranks = [DEFAULT_MAX_RANK]
    for path in paths:
        if instance_address(path.path) is None:
            try:
                ranks.append(read_folder(path)[0].max_rank)
            except ValueError as error:
                raise ValueError(f"--lora-paths {path.name}: {error}") from error
    return paths, args if args.max_lora_rank is not None else dataclasses.replace(args, max_lora_rank=max(ranks))


async def load_first_adapters(
    control: LoraControl, paths: list[LoraPath], args: ServerArgs, givers: Sequence[str]
) -> None:
    """Load those that the flags name, and those of the instances that the model's weights are from.

    Args:
        givers: URLs of those that a metadata server has listed and that have given the weights.

    Raises:
        RequestError, ServiceError: if one can't be loaded.
    """
    for path in paths:
        await control.load_path(path)
    are_listed = args.modelexpress is not None
    seeds = [_address(url) for url in givers] if are_listed else args.seeds
    if not args.has_lora or not seeds:
        return
    if are_listed and args.weights_digest is not None:
        logger.info("no adapters are taken from an instance that is only listed: --weights-digest does not name theirs")
        return
    listed = await control.ask_first(seeds, are_listed=are_listed)
    if isinstance(listed, str):
        # The seeds may be of a kind without adapters; or gone, and the model's weights have come from files.
        if args.remote_instance_weight_loader_fallback == "error":
            raise RequestError(listed)
        logger.warning("no adapters are taken from the seeds: %s", listed)
    else:
        await control.load_listed(*listed, is_listed=are_listed)


def _address(url: str) -> SeedAddress:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None, "the loader's own words"
    return SeedAddress(parts.hostname, parts.port, parts.scheme)
