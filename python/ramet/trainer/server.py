"""Owns what one rank of a trainer answers over HTTP: where its weights are, and what slices of them hash to."""

from collections.abc import Callable

import msgspec

from ramet.srt.entrypoints.directory_http import DirectoryHandler, error_body
from ramet.srt.entrypoints.engine_info_bootstrap_server import EngineInfoBootstrapServer
from ramet.srt.model_loader.remote_instance_weight_loader_utils import CHECKSUMS_PATH, SEED_PATHS
from ramet.srt.utils.key_proof import is_proof
from ramet.srt.utils.net import format_address, host_from_here, reachable_host
from ramet.srt.utils.outside_json import decode_json
from ramet.srt.weights.control_messages import WeightChecksumsOutput, WeightChecksumsReq, WeightReply, WeightRequest
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.registration import MAX_CHECKSUM_REGIONS, ChecksumsAnswer, ChecksumsRequest, SeedRegistration

ROLE = "target"
RANK = 0  # a trainer's rank is a seed by itself


class _Handler(DirectoryHandler):
    directory: "PublisherServer"
    info_paths = SEED_PATHS

    def do_PUT(self) -> None:
        """Nobody but the trainer itself registers here."""
        self.send(404, error_body("weights are published by the trainer's own process"))

    def refuses_asking(self) -> bool:
        is_proven = self.directory.has_proof(self.headers.get("Authorization", ""), self.command, self.path)
        return not is_proven and super().refuses_asking()

    def do_POST(self) -> None:
        if self.path != CHECKSUMS_PATH:
            self.send(404, error_body(f"there is no {self.path:.200} here"))
        elif not self.refuses_asking() and (body := self.read_body()) is not None:
            self.send(*self.directory.checksums(bytes(body)))


class PublisherServer(EngineInfoBootstrapServer):
    """An HTTP server in a thread, which knows what the trainer's rank publishes now, if anything.

    Args:
        api_key: that who asks must show, or prove to have (utils/key_proof.py): instances show no key to what a
            metadata server lists. None: who comes from this host's own pages alone is refused.
    """

    handler = _Handler

    def __init__(self, host: str, port: int, api_key: str | None) -> None:
        """Raises OSError if the address can't be bound."""
        self._ask: Callable[[WeightRequest], WeightReply] | None = None
        self._api_key = api_key
        super().__init__(host, port, api_key=api_key)

    def show(self, registration: SeedRegistration, ask: Callable[[WeightRequest], WeightReply]) -> None:
        """Answer with this from now on.

        Args:
            ask: answers for what only the holder of the weights can tell.

        Raises:
            ValueError: if it is too large to be told.
        """
        self.register(msgspec.json.encode(registration))
        self._ask = ask
        self.resume(ROLE)

    def hide(self) -> None:
        """Have who asks come again in a moment."""
        self.suspend(ROLE)
        self._ask = None

    def has_proof(self, authorization: str, method: str, target: str) -> bool:
        """Whether a request with this header proves that its sender has the key."""
        authorities = {format_address(find(self.host), self.port) for find in (host_from_here, reachable_host)}
        return self._api_key is not None and is_proof(authorization, self._api_key, method, authorities, target)

    def checksums(self, body: bytes) -> tuple[int, bytes]:
        """HTTP status and JSON body of the answer to a ChecksumsRequest."""
        if (suspended := self.suspension(ROLE)) is not None:
            return suspended[0], error_body(suspended[1])
        try:
            request = decode_json(body, ChecksumsRequest)
            if (request.rank, request.role) != (RANK, ROLE) or len(request.regions) > MAX_CHECKSUM_REGIONS:
                raise ValueError(f"at most {MAX_CHECKSUM_REGIONS} slices of rank {RANK} of the {ROLE} model")
        except ValueError as error:
            return 400, error_body(str(error))
        ask = self._ask
        if ask is None:
            return 503, error_body("other weights are being published: ask again in a moment")
        try:
            reply = ask(WeightChecksumsReq(regions=request.regions))
        except (ValueError, RuntimeError, WeightTransferError) as error:
            return 400, error_body(str(error))
        assert isinstance(reply, WeightChecksumsOutput)
        return 200, msgspec.json.encode(ChecksumsAnswer(algorithm=reply.algorithm, checksums=reply.checksums))
