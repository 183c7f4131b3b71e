"""A rank answers its main process, also when it can't do what it is asked."""

import asyncio
import socket

import pytest
from ramet.srt.model_loader.seed.control import WeightControlServer, ask_rank
from ramet.srt.weights.control_messages import SendWeightsReq, WeightControlError, WeightReply, WeightRequest


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
@pytest.mark.parametrize(
    "error", [ValueError("no such transfer"), RuntimeError("CUDA error: no room\nCUDA kernel errors might be reported")]
)
def test_a_rank_says_why_it_can_not(error: Exception, host: str | None) -> None:
    def refuse(request: WeightRequest) -> WeightReply:
        raise error

    server = WeightControlServer(refuse, host)
    try:
        reply = asyncio.run(ask_rank(server.address, SendWeightsReq(transfer_id="a"), 10.0))
    finally:
        server.close()
    assert reply == WeightControlError(message=str(error).splitlines()[0])


def test_who_does_not_know_the_token_is_cut_off_before_anything_else_is_read() -> None:
    server = WeightControlServer(lambda request: WeightControlError(message="answered"), "127.0.0.1")
    try:
        with socket.create_connection(("127.0.0.1", server.address.port), timeout=5) as stranger:
            stranger.sendall(b"0" * len(server.address.token))
            assert stranger.recv(10) == b""
        known = asyncio.run(ask_rank(server.address, SendWeightsReq(transfer_id="a"), 10.0))
    finally:
        server.close()
    assert known == WeightControlError(message="answered")
