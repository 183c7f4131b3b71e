"""Owns what an instance is toward other instances: where its ranks register, who may come for weights, who is told."""

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING

from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.lora.adapter import lora_role
from ramet.srt.model_loader.seed.control import ask_rank
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.net import is_loopback
from ramet.srt.weights.control_messages import (
    InstanceReady,
    InstanceStopping,
    WeightControlError,
    WeightReply,
    WeightRequest,
)

if TYPE_CHECKING:
    from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer

logger = logging.getLogger(__name__)

NO_SEED = (
    "this instance gives its weights to nobody: it was started without "
    "--remote-instance-weight-loader-start-seed-via-transfer-engine"
)
TELL_TIMEOUT_S = 5.0  # for a rank to note that the instance is healthy, or about to end


class WeightDoors:
    """Of the node that serves users.

    Args:
        bootstrap: where the ranks register; None in an instance that gives its weights to nobody.
        is_listed: whether a metadata server lists the ranks, which must be told how the instance is.
    """

    def __init__(self, bootstrap: "EngineInfoBootstrapServer | None", num_ranks: int, *, is_listed: bool):
        self.bootstrap = bootstrap
        self._num_ranks = num_ranks if is_listed and bootstrap is not None else 0  # to be told
        self._telling: set[asyncio.Task[None]] = set()

    @property
    def gives_weights(self) -> bool:
        """Whether other instances may come for the weights."""
        return self.bootstrap is not None

    def close_for_weights(self, *, asleep: bool = False) -> None:
        """Send nobody to the weights."""
        assert self.bootstrap is not None
        self.bootstrap.suspend("target", asleep=asleep)

    def open_for_weights(self) -> None:
        """All ranks have registered their weights anew: others may come."""
        assert self.bootstrap is not None
        self.bootstrap.resume("target")
        self.tell_ranks(InstanceReady())

    def transfer_engine_info(self, role: str, rank: int) -> bytes | None:
        """What /remote_instance_transfer_engine_info answers for a rank, as JSON; None if it has not registered.

        Raises:
            ServiceError: if its weights are being changed, or the instance sleeps.
        """
        if self.bootstrap is None:
            return None
        if (suspended := self.bootstrap.suspension(role)) is not None:
            raise ServiceError(suspended[1], status_code=suspended[0])
        return self.bootstrap.get_json(role, rank)

    def why_absent(self, role: str, rank: int) -> str:
        """What is said of a rank that has not registered."""
        return NO_SEED if self.bootstrap is None else f"rank {rank} of {role!r} has not registered its weights"

    def forget_adapter(self, name: str) -> None:
        """No instance shall come for an adapter any more."""
        if self.bootstrap is not None:
            self.bootstrap.forget(lora_role(name))

    def shut(self) -> None:
        """End the bootstrap server. May be called from any thread, and again."""
        if self.bootstrap is not None:
            self.bootstrap.close()

    async def ask_rank(self, role: str, rank: int, request: WeightRequest, timeout_s: float) -> WeightReply:
        """What a rank, on whatever node, replies to a request about its weights.

        Raises:
            RequestError: if there is no such rank, or it refuses.
            ServiceError: if it does not answer within `timeout_s`.
        """
        address = None if self.bootstrap is None else self.bootstrap.control_address(role, rank)
        if address is None:
            raise RequestError(self.why_absent(role, rank), param="rank", status_code=404)
        try:
            reply = await ask_rank(address, request, timeout_s)
        except OverflowError:  # JSON has larger numbers than the message to the rank
            raise RequestError("a number in the body is beyond 64 bits") from None
        except (OSError, TimeoutError) as error:
            cause = (
                f"has not answered within {timeout_s:g} s" if isinstance(error, TimeoutError) else f"is gone: {error}"
            )
            raise ServiceError(f"rank {rank} {cause}") from None
        if isinstance(reply, WeightControlError):
            raise ServiceError(reply.message) if reply.is_busy else RequestError(reply.message)
        return reply

    def tell_ranks(self, news: InstanceReady | InstanceStopping) -> None:
        """Tell every rank of every node that other instances are told about. Waits for nothing."""
        for rank in range(self._num_ranks):
            task = asyncio.create_task(self._tell_rank(rank, news))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell_rank(self, rank: int, news: InstanceReady | InstanceStopping) -> None:
        try:
            await self.ask_rank("target", rank, news, TELL_TIMEOUT_S)
        except (RequestError, ServiceError) as error:
            logger.warning("rank %d could not be told of %s: %s", rank, type(news).__name__, error)

    async def wait_told(self) -> None:
        """Wait for what ranks are being told."""
        if self._telling:
            await asyncio.wait(self._telling)


def start_bootstrap(args: ServerArgs) -> "tuple[EngineInfoBootstrapServer, ServerArgs]":
    """The server where an instance's ranks register, and the arguments with its port.

    Raises:
        ValueError: if it can't listen there.
    """
    from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer

    try:
        bootstrap = EngineInfoBootstrapServer(
            args.host,
            args.engine_info_bootstrap_port,
            admin_api_key=args.admin_api_key,
            api_key=args.api_key,
            num_ranks=args.world_size,
            allowed_hosts=args.allowed_host_names,
        )
    except OSError as error:
        raise ValueError(error.strerror) from None
    if args.registration_key is None and not is_loopback(args.host):
        logger.warning(
            "whoever reaches port %d of %s can register weights in place of this instance's: --api-key or "
            "--admin-api-key closes it",
            bootstrap.port,
            args.host,
        )
    return bootstrap, dataclasses.replace(args, engine_info_bootstrap_port=bootstrap.port)
