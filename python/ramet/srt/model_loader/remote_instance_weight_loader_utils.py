"""Owns the talk with a seed's HTTP ports: registering a rank, asking for one, and what two sides must agree on."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import msgspec

from ramet.srt.observability.logs import escape_text
from ramet.srt.utils.key_proof import make_proof
from ramet.srt.utils.net import SeedAddress, format_address
from ramet.srt.utils.outside_json import decode_json
from ramet.srt.weights.content_digest import MAX_TENSORS, TensorDigest, decode_tensors
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.registration import (
    MAX_CHECKSUM_REGIONS,
    MAX_REGISTRATION_BYTES,
    ChecksumsAnswer,
    ChecksumsRequest,
    DigestTableAnswer,
    DigestTableRequest,
    SeedAnswer,
    SeedRegistration,
    parse_answer,
)

logger = logging.getLogger(__name__)


class SeedRefused(WeightTransferError):
    """The seed answers, but not with a rank's weights."""


class RankNotRegistered(SeedRefused):
    """The seed knows no such rank."""


@dataclass(frozen=True)
class SeedServer:
    """A seed's HTTP server, and what it takes to be answered by it."""

    address: SeedAddress
    api_keys: Sequence[str] = ()  # tried in this order, if the seed wants one
    ca_certs: str | None = None  # see http_request
    shows_keys: bool = True  # False: who is there may be a stranger, who only gets a proof that one has them

    def authorization(self, key: str | None, method: str, target: str) -> dict[str, str]:
        """The header with a key, or with a proof of it for this request alone."""
        if key is None or self.shows_keys:
            return _authorization(key)
        authority = format_address(self.address.host, self.address.port)
        return {"Authorization": make_proof(key, method, authority, target)}

    @property
    def name(self) -> str:
        return self.address.name


# The second is upstream's name for the first, and the only one that an upstream seed knows.
SEED_PATHS = ("/remote_instance_transfer_engine_info", "/get_remote_instance_transfer_engine_info")
CHECKSUMS_PATH = "/remote_instance_weight_checksums"
DIGEST_PATH = "/remote_instance_weights_digest"
INIT_SEND_GROUP_PATH = "/init_weights_send_group_for_remote_instance"
SEND_WEIGHTS_PATH = "/send_weights_to_remote_instance"
MAX_TABLE_BYTES = 512 << 20  # of all answers together
POLL_PERIOD_S = 0.25
ABSENT_GRACE_S = 2.0  # a seed that is not there, or knows no such rank, gets this long to appear
REQUEST_TIMEOUT_S = 10.0
RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)  # not ready: worth the whole time


def register_transfer_engine_info(
    url: str,
    registration: SeedRegistration,
    *,
    admin_api_key: str | None,
    timeout_s: float,
    ca_certs: str | None = None,
) -> None:
    """Register a rank with its instance's bootstrap server, retrying until the deadline.

    Args:
        url: of the server, http:// or https://.
        ca_certs: see http_request.

    Raises:
        WeightTransferError: if it was refused, or not accepted within `timeout_s`.
    """
    from ramet.srt.utils.http_client import http_request  # imports requests

    parts = urlsplit(url)
    headers = {"Content-Type": "application/json"} | _authorization(admin_api_key)
    body = msgspec.json.encode(registration)
    deadline = time.monotonic() + timeout_s
    reason = "no time was given"
    while (left := deadline - time.monotonic()) > 0:
        try:
            status, answer = http_request(
                f"{parts.scheme}://{parts.netloc}/register_transfer_engine_info",
                "PUT",
                timeout_s=min(left, REQUEST_TIMEOUT_S),
                max_nbytes=1 << 16,
                body=body,
                headers=headers,
                ca_certs=ca_certs,
            )
        except (OSError, ValueError) as error:
            reason = str(error)
        else:
            if status == 200:
                return
            reason = f"HTTP {status}: {_excerpt(answer)}"
            if status in (400, 401, 403, 413):
                break  # trying again would not help
        time.sleep(max(0.0, min(POLL_PERIOD_S, deadline - time.monotonic())))
    raise WeightTransferError("register", registration.world_rank, url, reason)


def fetch_seed_answer(
    server: SeedServer,
    rank: int,
    role: str,
    timeout_s: float,
    absent_grace_s: float = ABSENT_GRACE_S,
    is_listed: bool = False,
    start_grace_s: float = ABSENT_GRACE_S,
) -> SeedAnswer:
    """What a seed says of a rank's weights. One that is still starting is asked again until the time is up.

    Args:
        absent_grace_s: how long a rank that the seed does not know may take to register.
        start_grace_s: how long a seed that is not there may take to come.
        is_listed: the seed has said that it is up, so one that is not has died, and another may start in its place.

    Raises:
        RankNotRegistered: if it has not.
        WeightTransferError: if no sound answer came within `timeout_s`.
    """
    start = time.monotonic()
    query = f"?rank={rank}" + ("" if role == "target" else f"&role={quote(role, safe=':')}")
    reason = "no time was given"
    is_waiting = False
    while (left := start + timeout_s - time.monotonic()) > 0:
        try:
            status, path, body = _ask(server, query, left)
            if status == 200:
                return _parse(body, rank, role, server.name)
            is_late = time.monotonic() - start >= absent_grace_s
            reason = _reason_to_wait(status, path, body, _Asked(rank, server.name, is_late, is_listed))
        except ConnectionRefusedError as error:
            reason = f"it is not there ({error.strerror})"
            if is_listed or time.monotonic() - start >= start_grace_s:
                break
        except TimeoutError as error:
            reason = str(error)
        except (OSError, ValueError) as error:
            raise WeightTransferError("ask", rank, server.name, error) from error
        if not is_waiting:
            logger.info("rank %d: waiting up to %g s for the seed %s: %s", rank, round(timeout_s, 1), server.name,
                        reason)  # fmt: skip
            is_waiting = True
        time.sleep(max(0.0, min(POLL_PERIOD_S, start + timeout_s - time.monotonic())))
    raise WeightTransferError("ask", rank, server.name, reason)


@dataclass(frozen=True)
class _Asked:
    """A question about a rank that was not answered with its weights."""

    rank: int
    seed: str
    is_late: bool  # a rank that the seed does not know now will not come
    is_listed: bool  # see fetch_seed_answer


def _reason_to_wait(status: int, path: str, body: bytes, asked: _Asked) -> str:
    """Why asking again may help. Raises RankNotRegistered or SeedRefused if it will not."""
    reason = f"it answers HTTP {status} to {path}: {_excerpt(body)}"
    if status == 401:
        reason = "HTTP 401: the seed has other API keys; instances that share weights must share --api-key"
    if status == 404 and asked.is_late:
        raise RankNotRegistered("ask", asked.rank, asked.seed, reason)
    if (status not in RETRIED_STATUS and status != 404) or (status == 503 and asked.is_listed):
        raise SeedRefused("ask", asked.rank, asked.seed, reason)
    return reason


def fetch_checksums(server: SeedServer, request: ChecksumsRequest, timeout_s: float) -> ChecksumsAnswer | None:
    """What slices of checkpoint tensors hash to in the weights of a seed's rank; None if the seed can't tell.

    Raises:
        WeightTransferError: if no sound answer came within `timeout_s` to one of the requests that this takes.
    """
    algorithm, checksums = "", list[str]()
    try:
        for start in range(0, max(1, len(request.regions)), MAX_CHECKSUM_REGIONS):
            regions = request.regions[start : start + MAX_CHECKSUM_REGIONS]
            part = _fetch_checksums_at_once(server, msgspec.structs.replace(request, regions=regions), timeout_s)
            if part is None:
                return None
            algorithm = part.algorithm
            checksums += part.checksums
    except (OSError, ValueError) as error:
        raise WeightTransferError("verify", request.rank, server.name, error) from error
    return ChecksumsAnswer(algorithm=algorithm, checksums=checksums)


def _fetch_checksums_at_once(server: SeedServer, request: ChecksumsRequest, timeout_s: float) -> ChecksumsAnswer | None:
    deadline = time.monotonic() + timeout_s
    while True:
        status, body = post_to_seed(server, CHECKSUMS_PATH, request, max(0.001, deadline - time.monotonic()))
        if status not in RETRIED_STATUS or time.monotonic() + POLL_PERIOD_S > deadline:
            break
        time.sleep(POLL_PERIOD_S)  # others have their turn
    if status in (404, 405):
        return None
    if status != 200:
        raise ValueError(f"it answers HTTP {status} to {CHECKSUMS_PATH}: {_excerpt(body)}")
    answer = decode_json(body, ChecksumsAnswer)
    if len(answer.checksums) != len(request.regions):
        raise ValueError(f"it sent {len(answer.checksums)} checksums for {len(request.regions)} slices")
    return answer


def fetch_digest_tensors(server: SeedServer, rank: int, role: str, timeout_s: float) -> list[TensorDigest]:
    """The table of hashes behind a seed's digest, in parts; as the seed tells it, so it proves nothing by itself.

    Args:
        rank: of the seed.
        timeout_s: for all of it.

    Raises:
        WeightTransferError: if it has none, or did not come whole within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    tensors: list[TensorDigest] = []
    nbytes = 0
    try:
        while True:
            request = DigestTableRequest(rank=rank, role=role, first=len(tensors))
            status, body = post_to_seed(server, DIGEST_PATH, request, max(0.001, deadline - time.monotonic()))
            if status != 200:
                raise ValueError(f"it answers HTTP {status} to {DIGEST_PATH}: {_excerpt(body)}")
            answer = decode_json(body, DigestTableAnswer)
            if not 0 < answer.num_tensors <= MAX_TENSORS:
                raise ValueError("it has no table of hashes for the digest of its weights (ramet digest on its "
                                 "files, or --weights-digest, makes one)")  # fmt: skip
            nbytes += len(body)
            if nbytes > MAX_TABLE_BYTES:
                raise ValueError(f"its table of hashes is longer than {MAX_TABLE_BYTES} bytes")
            part = decode_tensors(answer.tensors)
            tensors += part
            if len(tensors) >= answer.num_tensors:
                return tensors
            if not part:
                raise ValueError(f"it has sent {len(tensors)} of {answer.num_tensors} tensors' hashes")
    except (OSError, ValueError) as error:
        raise WeightTransferError("verify", rank, server.name, error) from error


def post_to_seed(server: SeedServer, path: str, body: msgspec.Struct, timeout_s: float) -> tuple[int, bytes]:
    """Status and body of a seed's answer. Raises OSError or ValueError as `http_request` does."""
    return _request(server, "POST", path, timeout_s, msgspec.json.encode(body))


def get_from_seed(server: SeedServer, path: str, timeout_s: float) -> tuple[int, bytes]:
    """The same of a question without a body."""
    return _request(server, "GET", path, timeout_s)


def _request(
    server: SeedServer, method: str, path: str, timeout_s: float, body: bytes | None = None
) -> tuple[int, bytes]:
    """Status and body of the answer to the first key that the seed takes."""
    from ramet.srt.utils.http_client import http_request  # imports requests

    deadline = time.monotonic() + timeout_s
    for key in server.api_keys or (None,):
        status, answer = http_request(
            server.address.url + path,
            method,
            timeout_s=max(0.001, deadline - time.monotonic()),
            max_nbytes=MAX_REGISTRATION_BYTES,
            body=body,
            headers=({} if body is None else {"Content-Type": "application/json"})
            | server.authorization(key, method, path),
            ca_certs=server.ca_certs,
        )
        if status != 401:
            break
    return status, answer


def _authorization(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _ask(server: SeedServer, query: str, timeout_s: float) -> tuple[int, str, bytes]:
    """Status, path and body of the first route that the seed knows."""
    deadline = time.monotonic() + timeout_s
    for path in SEED_PATHS:
        left = max(0.001, deadline - time.monotonic())
        status, body = _request(server, "GET", path + query, left)
        if status not in (404, 405):
            break
    return status, path, body


def _parse(body: bytes, rank: int, role: str, seed: str) -> SeedAnswer:
    try:
        answer = parse_answer(body)
        if answer.rank != rank or answer.role != role:
            raise ValueError(f"it is about rank {answer.rank} of the {answer.role} model")
    except ValueError as error:
        raise WeightTransferError("ask", rank, seed, f"its answer is of no use: {error}") from error
    return answer


def _excerpt(body: bytes) -> str:
    return escape_text(body[:200].decode("utf-8", "replace").strip()) or "empty"
