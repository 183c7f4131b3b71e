"""Owns what an instance does about ModelExpress before its ranks start."""

import dataclasses
import logging
from typing import TYPE_CHECKING

from ramet.srt.configs.modelexpress_config import ModelExpressConfig, resolve_address
from ramet.srt.modelexpress.settings import check_environment, check_installed
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import is_loopback, reachable_host, split_address

if TYPE_CHECKING:
    from ramet.srt.modelexpress.server.server import ModelExpressServer

logger = logging.getLogger(__name__)


def prepare_modelexpress(
    args: ServerArgs, config: ModelExpressConfig
) -> "tuple[ModelExpressServer | None, ServerArgs]":
    """Start the metadata server if this instance has one; that, and the arguments with what the ranks need to know.

    Raises:
        ValueError: if it can't start, or a file that the environment names can't be read.
    """
    check_environment()
    is_head, server = args.node_rank == 0, None
    if is_head and not config.is_embedded:
        _warn_of_loopback(args, resolve_address(config.url))
    if config.is_embedded:
        check_installed()
        from ramet.srt.entrypoints.embedded_modelexpress import start_embedded_server

        server, url = start_embedded_server(config, args.host, args.head_host, is_head)
        config = dataclasses.replace(config, url=url, source=not args.takes_weights_from_instances)
    return server, dataclasses.replace(args, modelexpress_config=config.to_json())


def _warn_of_loopback(args: ServerArgs, server_address: str) -> None:
    host = args.host if args.nnodes > 1 else reachable_host(args.host)
    if is_loopback(host) and not is_loopback(split_address(server_address, "url")[0]):
        logger.warning(
            "this instance says to the ModelExpress server %s that it is at %s: other hosts would look for it on "
            "themselves; start it with --host and an address of this host",
            server_address,
            host,
        )
