"""A rank answers its main process, also when it can't do what it is asked."""

import asyncio

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
