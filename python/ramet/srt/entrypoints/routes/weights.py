"""Owns the HTTP routes with which a client asks for more of an instance's weights than where they are."""

import asyncio
import re
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from ramet.srt.entrypoints.http.error_descriptions import ERRORS, NOT_FOUND
from ramet.srt.entrypoints.http.event_stream import json_response
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.errors import RequestError, ServiceError
from ramet.srt.utils.outside_json import decode_json
from ramet.srt.weights.control_messages import (
    DigestTableOutput,
    DigestTableReq,
    InitSendGroupReq,
    SendWeightsReq,
    WeightChecksumsOutput,
    WeightChecksumsReq,
)
from ramet.srt.weights.registration import (
    MAX_CHECKSUM_REGIONS,
    ChecksumsRequest,
    DigestTableAnswer,
    DigestTableRequest,
    InitSendGroupAnswer,
    InitSendGroupBody,
    SendWeightsBody,
)

CHECKSUMS_TIMEOUT_S = 60.0
MAX_WAITING_CHECKSUMS = 16
MAX_WAITING_DIGESTS = 256  # each takes milliseconds
SEND_TIMEOUT_S = 3600.0  # the ranks have shorter ones for each step

Body = Any


def make_weight_router(instance: Instance) -> APIRouter:
    """The routes of `instance`."""
    router = APIRouter(tags=["weights"], responses=ERRORS | NOT_FOUND)
    checksums_turn, digest_turn = Turns(MAX_WAITING_CHECKSUMS), Turns(MAX_WAITING_DIGESTS)

    @router.post("/remote_instance_weight_checksums")
    async def remote_instance_weight_checksums(request: Request) -> Response:
        """Checksums of slices of checkpoint tensors, for a client that has taken other slices than this rank has.

        The body is {"rank": R, "regions": [[tensor's name, [[start, stop], …]], …]}, the answer {"algorithm",
        "checksums": […]}.
        """
        body = _decode(await request.body(), ChecksumsRequest)
        if len(body.regions) > MAX_CHECKSUM_REGIONS:
            raise RequestError(
                f"regions has {len(body.regions)} slices; at most {MAX_CHECKSUM_REGIONS} are taken at once",
                param="regions",
                status_code=413,
            )
        question = WeightChecksumsReq(regions=body.regions)
        async with checksums_turn:
            reply = await instance.doors.ask_rank(body.role, body.rank, question, CHECKSUMS_TIMEOUT_S)
        assert isinstance(reply, WeightChecksumsOutput)
        return json_response({"algorithm": reply.algorithm, "checksums": reply.checksums})

    @router.post("/remote_instance_weights_digest")
    async def remote_instance_weights_digest(request: Request) -> Response:
        """A part of the table of hashes behind the digest of the weights, for a client that insists on a digest.

        The body is {"rank": R, "first": index of a tensor}, the answer {"num_tensors", "tensors": base64}.
        """
        body = _decode(await request.body(), DigestTableRequest)
        question = DigestTableReq(first=body.first)
        async with digest_turn:
            reply = await instance.doors.ask_rank(body.role, body.rank, question, CHECKSUMS_TIMEOUT_S)
        assert isinstance(reply, DigestTableOutput)
        answer = DigestTableAnswer(num_tensors=reply.num_tensors, tensors=reply.tensors)
        return json_response(msgspec.to_builtins(answer))

    @router.post("/init_weights_send_group_for_remote_instance")
    async def init_weights_send_group_for_remote_instance(request: Request) -> Response:
        """Have ranks meet those of a client, each in a group of two. WIRE: SGLang's; see docs/wire.md."""
        try:
            body = _decode(await request.body(), InitSendGroupBody)
            replies = await _ask_all(instance, body.role, _init_requests(instance, body))
        except (RequestError, ServiceError) as error:
            return _outcome(False, str(error), error.status_code)
        answer = InitSendGroupAnswer(
            success=True,
            message=f"{len(replies)} ranks listen",
            transfer_id=replies[0].transfer_id if body.rank is not None else "",
            master_address=replies[0].master_address,
            ports=",".join(str(reply.port) for reply in replies),
            warm_up=replies[0].warm_up,
        )
        return json_response(msgspec.to_builtins(answer))

    @router.post("/send_weights_to_remote_instance")
    async def send_weights_to_remote_instance(request: Request) -> Response:
        """Send what was agreed on; answered when it has been sent. WIRE: SGLang's; see docs/wire.md."""
        try:
            body = _decode(await request.body(), SendWeightsBody)
            replies = await _ask_all(instance, body.role, _send_requests(instance, body))
        except (RequestError, ServiceError) as error:
            return _outcome(False, str(error), error.status_code)
        num_bytes = sum(reply.num_bytes for reply in replies)
        return _outcome(True, f"{len(replies)} ranks have sent {num_bytes} bytes")

    return router


class Turns:
    """One request at a time; a few wait for their turn, and others are refused.

    Raises:
        ServiceError: on entering, if too many wait, or the turn does not come in time.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        if self._num_waiting >= self._max_waiting:
            raise ServiceError(f"{self._num_waiting} such requests wait already: try again")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(CHECKSUMS_TIMEOUT_S):
                await self._lock.acquire()
        except TimeoutError:
            raise ServiceError("too many such requests: try again") from None
        finally:
            self._num_waiting -= 1

    async def __aexit__(self, *_exception: object) -> None:
        self._lock.release()


def _outcome(success: bool, message: str, status_code: int = 200) -> Response:
    """An answer as upstream's clients expect it, of failures too."""
    content = msgspec.json.encode({"success": success, "message": message})
    return Response(content, status_code, media_type="application/json")


def _init_requests(instance: Instance, body: InitSendGroupBody) -> dict[int, InitSendGroupReq]:
    """What to ask which rank. Raises RequestError if the body contradicts itself."""
    if (body.group_rank, body.world_size) != (0, 2):
        raise RequestError("the seed is rank 0 of a group of 2 (group_rank, world_size)", param="group_rank")
    if body.rank is not None:
        request = InitSendGroupReq(
            port=_parse_ports(body.ports or "0")[0],
            backend=body.backend,
            broadcasts=body.broadcasts,
            layout=body.layout,
            timeout_s=body.timeout_s,
            warm_up=body.warm_up,
        )
        return {body.rank: request}
    return {
        rank: InitSendGroupReq(port=port, group_name=name, backend=body.backend, timeout_s=body.timeout_s)
        for rank, (port, name) in _upstream_groups(instance, body).items()
    }


def _send_requests(instance: Instance, body: SendWeightsBody) -> dict[int, SendWeightsReq]:
    if body.rank is not None:
        return {body.rank: SendWeightsReq(transfer_id=body.group_name)}
    return {rank: SendWeightsReq(transfer_id=name) for rank, (_, name) in _upstream_groups(instance, body).items()}


def _upstream_groups(instance: Instance, body: InitSendGroupBody | SendWeightsBody) -> dict[int, tuple[int, str]]:
    """Port and full name of each rank's group, as upstream's two sides compute it."""
    ports = _parse_ports(body.ports)
    args = instance.server_args
    if not body.group_name:
        raise RequestError("group_name is empty", param="group_name")
    if len(ports) != args.tp_size or args.pp_size > 1:
        raise RequestError(
            f"this instance has {args.tp_size} tensor-parallel ranks in {args.pp_size} pipeline stages; a client "
            f"that names {len(ports)} ports and no rank must have as many ranks in one stage",
            param="ports",
        )
    return {rank: (port, f"{body.group_name}_{port}_{rank}") for rank, port in enumerate(ports)}


def _parse_ports(text: str) -> list[int]:
    ports = [int(part) if re.fullmatch(r"\s*[0-9]{1,5}\s*", part) else -1 for part in text.split(",")]
    if not all(0 <= port <= 65535 for port in ports):
        raise RequestError(f"ports must be port numbers joined by commas; got {text!r:.200}", param="ports")
    return ports


async def _ask_all(instance: Instance, role: str, requests: dict[int, Any]) -> list[Any]:
    """Each rank's reply; the first failure, once all have ended, as an exception."""
    questions = [instance.doors.ask_rank(role, rank, request, SEND_TIMEOUT_S) for rank, request in requests.items()]
    replies = await asyncio.gather(*questions, return_exceptions=True)
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return replies


def _decode(data: bytes, kind: type[Body]) -> Body:
    """Half a million slices would take too long through pydantic."""
    try:
        return decode_json(data, kind)
    except ValueError as error:
        raise RequestError(f"the body can't be used: {error}") from None
