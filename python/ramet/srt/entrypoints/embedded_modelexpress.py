"""Owns the metadata server that a first instance runs in its own head process, for a fleet on one machine."""

import logging
import os
import time

from ramet.srt.configs.modelexpress_config import ModelExpressConfig, embedded_port
from ramet.srt.modelexpress.client.client import ModelExpressClient, ModelExpressError
from ramet.srt.modelexpress.server.server import ModelExpressServer, ServerOptions
from ramet.srt.utils.net import format_address, split_address

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
PROBE_PAUSE_S = 0.2
TAKEN_PATIENCE_S = 10.0  # with whoever has the port, before it is said to be something else


def start_embedded_server(
    config: ModelExpressConfig, host: str, head_host: str, is_head: bool
) -> tuple[ModelExpressServer | None, str]:
    """The server, and host:port at which the instance's ranks reach it.

    Only the head of the first instance starts one: the others find it at its port and use it.

    Args:
        host: that the instance binds to.
        head_host: of node 0, as this node reaches it.

    Raises:
        ValueError: if the port is taken by something else.
    """
    port = embedded_port(config.url)
    assert port is not None, "checked with the configuration"
    url = format_address(head_host, port)
    if not is_head or (port and probe(url) is None):
        logger.info("using the ModelExpress server at %s", url)
        return None, url
    token_file = os.environ.get("MX_AUTH_TOKEN_PATH")  # that its clients send: so it asks for it
    options = ServerOptions(host=host, port=port, metrics_port=port + 1 if port else 0, auth_token_file=token_file)
    server = ModelExpressServer(options)
    try:
        server.start()
    except ValueError as error:
        if not port:
            raise ValueError(f"the embedded ModelExpress server can't start: {error}") from None
        # Another instance may have started one in this moment, or have its processors busy.
        deadline = time.monotonic() + TAKEN_PATIENCE_S
        while (answer := probe(url)) is not None and time.monotonic() < deadline:
            time.sleep(PROBE_PAUSE_S)
        if answer is None:
            logger.info("using the ModelExpress server at %s", url)
            return None, url
        raise ValueError(
            f"the embedded ModelExpress server can't start: {error}; and no ModelExpress server that this instance "
            f"could use answers at {url}: {answer}"
        ) from None
    _, port = split_address(server.address, "--port")
    logger.info("embedded ModelExpress server at %s; the fleet is shown at %s", server.address, server.http_url)
    return server, format_address(head_host, port)


def probe(url: str) -> str | None:
    """None if a metadata server is there already; else what came of asking."""
    with ModelExpressClient(url, timeout_s=PROBE_TIMEOUT_S) as client:
        try:
            client.list_sources(model_name="")
        except ModelExpressError as error:
            logger.debug("no ModelExpress server yet: %s", error)
            return f"{error.code}: {error.details}"
    return None
