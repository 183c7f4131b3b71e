"""Owns filling a new instance's prefix cache from the one that has given its weights.

It never fails a start, and delays none by more than READY_S: what has not come by then comes while the instance serves.
"""

import asyncio
import functools
import importlib
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from ramet.srt.entrypoints.weight_doors import WeightDoors
from ramet.srt.errors import ServiceError
from ramet.srt.managers.prefix_messages import (
    HottestAnswer,
    HottestBody,
    HottestPrefixesOutput,
    HottestPrefixesReq,
    PagesBody,
    PrefixPagesOutput,
    WritePrefixReq,
    pack_keys,
    unpack_keys,
)
from ramet.srt.managers.tokenizer_manager import TokenizerManager
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, post_to_seed
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import SeedAddress
from ramet.srt.utils.outside_json import decode_json
from ramet.srt.weights.peer_messages import content_name
from ramet.srt.weights.registration import parse_answer

logger = logging.getLogger(__name__)

READY_S = 2.0  # by which an instance is ready later, at most
MOST_S = 60.0  # for all of it: afterwards the instance has its own requests' prefixes
CHUNK_BYTES = 4 << 20  # the giver's requests wait for as long as it takes to read so much


class NotGiven(Exception):
    """Nothing more can be had."""


def own_content(doors: WeightDoors) -> str:
    """The name of what this instance's weights are; "" while they can't be had."""
    if doors.bootstrap is None or doors.bootstrap.suspension("target") is not None:
        return ""
    answer = doors.bootstrap.get_json("target", 0)
    manifest = None if answer is None else parse_answer(answer).manifest
    return "" if manifest is None or manifest.checksums is None else content_name(manifest)


async def clone_prefix_cache(
    manager: TokenizerManager, doors: WeightDoors, args: ServerArgs, givers: Sequence[str]
) -> None:
    """Take the pages of the hottest prefixes of the first of the givers. Only free pages take them.

    Args:
        givers: URLs of instances whose weights this one has.
    """
    start = time.monotonic()
    clone = _Clone(manager, args, givers[0], start + MOST_S)
    reason = ""
    try:
        async with asyncio.timeout(MOST_S):
            await clone.run(await asyncio.to_thread(own_content, doors), args.clone_prefix_cache)
    except TimeoutError:
        reason = f"; no more within {MOST_S:g} s"
    except (NotGiven, ServiceError, OSError, ValueError) as error:
        reason = f"; no more: {error}"
    logger.info("took %d tokens of cached prefixes (%.3f GB) from %s in %.2f s%s", clone.num_tokens,
                clone.num_bytes / 1e9, givers[0], time.monotonic() - start, reason)  # fmt: skip


def prepare() -> None:
    """Import what would take time then."""
    importlib.import_module("ramet.srt.utils.http_client")


class _Clone:
    """One such taking."""

    def __init__(self, manager: TokenizerManager, args: ServerArgs, url: str, deadline: float) -> None:
        self._manager = manager
        parts = urlsplit(url)
        key = args.admin_api_key or args.api_key
        # Who may publish at a metadata server decides who is asked here: nobody's key must be had for that.
        self._server = SeedServer(
            SeedAddress(parts.hostname or "", parts.port or 0, parts.scheme),
            () if key is None else (key,),
            args.ssl_ca_certs,
            shows_keys=args.modelexpress is None,
        )
        self._deadline = deadline
        self.num_tokens = 0
        self.num_bytes = 0

    async def run(self, content: str, share: float) -> None:
        """Raises NotGiven, ServiceError, OSError or ValueError where it ends too early."""
        if not content:
            raise NotGiven("the own weights have no name")
        question = functools.partial(HottestPrefixesReq, max_pages=0)
        [own] = await self._manager.ask_all(question, HottestPrefixesOutput)
        if own.refusal:
            raise NotGiven(own.refusal)
        max_pages = int(share * own.num_pages)
        body = HottestBody(content=content, max_pages=max_pages)
        theirs = decode_json(await self._ask("/prefix_cache_hottest", body), HottestAnswer)
        if (theirs.layout, theirs.version) != (own.layout, own.version):
            raise NotGiven(
                f"a page there is {theirs.layout} of version {theirs.version!r}, here {own.layout} of {own.version!r}"
            )
        for packed, first in theirs.runs:
            keys = unpack_keys(packed)
            stop = len(keys) // own.page_size
            while first < stop and max_pages > 0:
                count = min(stop - first, max(1, CHUNK_BYTES // own.page_nbytes), max_pages)
                taken = await self._take(own, content, keys[: (first + count) * own.page_size], first, count)
                if not taken:
                    break  # it was evicted there; other prefixes may not be
                first += taken
                max_pages -= taken

    async def _take(self, own: HottestPrefixesOutput, content: str, keys: list[int], first: int, count: int) -> int:
        """Pages of one prefix; how many have come."""
        body = PagesBody(
            content=content,
            layout=own.layout,
            version=own.version,
            keys=pack_keys(keys),
            first=first,
            count=count,
        )
        data = await self._ask("/prefix_cache_pages", body)
        taken = len(data) // own.page_nbytes
        if len(data) % own.page_nbytes or taken > count:
            raise ValueError(f"it sent {len(data)} bytes for {count} pages of {own.page_nbytes}")
        if not taken:
            return 0
        question = functools.partial(
            WritePrefixReq,
            layout=own.layout,
            version=own.version,
            keys=keys[: (first + taken) * own.page_size],
            first=first,
            data=data,
            generation=own.generation,
        )
        [written] = await self._manager.ask_all(question, PrefixPagesOutput)
        if written.refusal:
            raise NotGiven(written.refusal)
        self.num_tokens += written.num_pages * own.page_size
        self.num_bytes += written.num_pages * own.page_nbytes
        return taken

    async def _ask(self, path: str, body: msgspec.Struct) -> bytes:
        timeout_s = max(0.001, self._deadline - time.monotonic())
        status, answer = await asyncio.to_thread(post_to_seed, self._server, path, body, timeout_s)
        if status != 200:
            raise NotGiven(f"it answers HTTP {status} to {path}: {answer[:200].decode('utf-8', 'replace')}")
        return answer
