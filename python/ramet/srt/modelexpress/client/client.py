"""Owns the calls to a metadata server: addresses, tokens, timeouts, and errors that say what failed where."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc

from ramet.srt.configs.modelexpress_config import resolve_address
from ramet.srt.environ import envs
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.rpc import FLEET_SERVICE, MAX_MESSAGE_BYTES, MESSAGE_SIZE_OPTIONS, client_calls
from ramet.srt.modelexpress.settings import open_token_file
from ramet.srt.modelexpress.tokens import TokenFile
from ramet.srt.observability.logs import escape_text

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0
REFUSED, NOT_TAKEN = "REFUSED", "NOT TAKEN"  # codes beside grpc's
SERVICE = p2p_pb2.DESCRIPTOR.services_by_name["P2pService"]
CHANNEL_OPTIONS = [
    *MESSAGE_SIZE_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),  # each client reconnects by itself
]


class ModelExpressError(Exception):
    """A call that failed: which, where, and why.

    `code` is grpc's status name ("UNAVAILABLE", …), "REFUSED" when the server answered with success=false, or
    "NOT TAKEN" for a claim that it has not acknowledged.
    """

    def __init__(self, method: str, address: str, code: str, details: str):
        super().__init__(escape_text(f"{method} at ModelExpress server {address} failed: {code}: {details}", 1000))
        self.method = method
        self.address = address
        self.code = code
        self.details = escape_text(details, 1000)


class ModelExpressClient:
    """Calls one metadata server. Threads may share it. The connection is made at the first call, and made again.

    Args:
        url: host:port, with or without http(s)://; None takes it from the environment (settings.resolve_address).
        timeout_s: longest time that one call may take.
        token_file: file with the bearer token; None takes MX_AUTH_TOKEN_PATH.
        tls_ca_file: certificates (PEM) of those who may sign the server's; None takes MX_TLS_CA_PATH. With neither the
            channel is not encrypted, whatever the prefix of the address: that is how every published client has it.

    Raises:
        ValueError: if a file cannot be read, or the address is none.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        token_file: str | None = None,
        tls_ca_file: str | None = None,
        environ: Mapping[str, str] = os.environ,
    ):
        self.address = resolve_address(url, environ)
        self.timeout_s = timeout_s
        self._tokens = TokenFile(token_file) if token_file else open_token_file(environ)
        self._pod = {f"pod_{name}": environ.get(f"POD_{name.upper()}", "") for name in ("name", "uid", "namespace")}
        self._channel = make_channel(self.address, tls_ca_file or environ.get("MX_TLS_CA_PATH"))
        self._calls = client_calls(self._channel, SERVICE)
        self._watch: Callable[[grpc.ChannelConnectivity], None] | None = None

    def watch_connection(self, on_loss: Callable[[], None]) -> None:
        """Have `on_loss` called, in another thread, whenever a connection that stood has been lost; once a client."""
        was_ready = False

        def note(state: grpc.ChannelConnectivity) -> None:
            nonlocal was_ready
            if was_ready and state != grpc.ChannelConnectivity.READY:
                on_loss()
            was_ready = state == grpc.ChannelConnectivity.READY

        self._watch = note
        self._channel.subscribe(note)

    def unwatch_connection(self) -> None:
        """To be called some time before `close`: grpc's watching thread does not expect the end of its channel."""
        if self._watch is not None:
            self._channel.unsubscribe(self._watch)
            self._watch = None

    def publish(self, identity: p2p_pb2.SourceIdentity, worker_id: str, worker: p2p_pb2.WorkerMetadata) -> str:
        """Store a worker's record, in place of the one that it had, and return the source id.

        Raises:
            ModelExpressError: if the server cannot be reached or refuses.
            ValueError: if the record is larger than a message may be.
        """
        request = p2p_pb2.PublishMetadataRequest(identity=identity, worker=worker, worker_id=worker_id, **self._pod)
        if request.ByteSize() > MAX_MESSAGE_BYTES and request.worker.HasField("tensor_source"):
            request.worker.ClearField("tensors")  # only readers of 0.3 need them
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"a record of {request.ByteSize()} bytes is more than the {MAX_MESSAGE_BYTES} of a message"
            )
        answer = self._call("PublishMetadata", request)
        if not answer.success:
            raise ModelExpressError("PublishMetadata", self.address, REFUSED, answer.message)
        return answer.mx_source_id

    def list_sources(
        self,
        identity: p2p_pb2.SourceIdentity | None = None,
        *,
        status: int | None = None,
        worker_rank: int | None = None,
        model_name: str | None = None,
    ) -> list[p2p_pb2.SourceInstanceRef]:
        """The sources with that identity, or all, newest first. Filters hold whether or not the server knows them.

        Raises:
            ModelExpressError: if the server cannot be reached.
        """
        request = p2p_pb2.ListSourcesRequest(
            identity=identity,
            status_filter=status,
            model_name_filter=model_name,
            worker_rank_filter=worker_rank,
        )
        return [
            ref
            for ref in self._call("ListSources", request).instances
            if (worker_rank is None or ref.worker_rank == worker_rank)
            and (model_name is None or ref.model_name == model_name)
        ]

    def get_metadata(self, source_id: str, worker_id: str) -> p2p_pb2.GetMetadataResponse:
        """A worker's record; `found` is false when there is none.

        Raises:
            ModelExpressError: if the server cannot be reached.
        """
        return self._call("GetMetadata", p2p_pb2.GetMetadataRequest(mx_source_id=source_id, worker_id=worker_id))

    def update_status(
        self,
        source_id: str,
        worker_id: str,
        worker_rank: int,
        status: int,
        load: float | None = None,
    ) -> bool:
        """Set the status and the load (from 0 to 1; None: unknown) of a record. False when the server refuses.

        Raises:
            ModelExpressError: if the server cannot be reached.
        """
        request = p2p_pb2.UpdateStatusRequest(
            mx_source_id=source_id, worker_id=worker_id, worker_rank=worker_rank, status=status, source_load=load
        )
        answer = self._call("UpdateStatus", request)
        if not answer.success:
            logger.debug("UpdateStatus at %s was refused: %s", self.address, answer.message)
        return answer.success

    def call_fleet(self, method: str, message: bytes) -> bytes:
        """A call of the service that holds fleets' targets. Only servers of ours have it.

        Raises:
            ModelExpressError: if the server cannot be reached, refuses, or has no such service ("UNIMPLEMENTED").
        """
        call = self._channel.unary_unary(f"/{FLEET_SERVICE}/{method}")
        return self._tell(method, call, message)

    def close(self) -> None:
        """Close the connection; calls that run fail."""
        self._channel.close()

    def __enter__(self) -> "ModelExpressClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, request: Any) -> Any:
        return self._tell(method, self._calls[method], request)

    def _tell(self, method: str, call: Callable[..., Any], request: Any) -> Any:
        metadata = (("authorization", f"Bearer {self._tokens.first()}"),) if self._tokens else None
        try:
            return call(request, timeout=self.timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            raise ModelExpressError(method, self.address, error.code().name, error.details() or "") from error
        except ValueError as error:  # grpc's answer to a call on a closed channel
            raise ModelExpressError(method, self.address, "CANCELLED", str(error)) from error


def make_channel(address: str, tls_ca_file: str | None) -> grpc.Channel:
    """A channel, encrypted if there is a certificate to check the server's by. No proxy is used unless asked for.

    Raises:
        ValueError: if the certificate cannot be read.
    """
    options = [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", int(envs.RAMET_FABRIC_PROXY.get() == "1"))]
    if tls_ca_file is None:
        return grpc.insecure_channel(address, options=options)
    try:
        certificates = Path(tls_ca_file).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the certificates of the ModelExpress server: {error}") from error
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(certificates), options=options)
