"""Having a key is proved to strangers without showing it, and the proof is good for nothing else."""

import asyncio
from typing import Any

from ramet.srt.entrypoints.http.http_access import AccessMiddleware
from ramet.srt.server_args import ServerArgs
from ramet.srt.utils.http_origin import OriginCheck
from ramet.srt.utils.key_proof import is_proof, make_proof

TARGET = "/remote_instance_transfer_engine_info?rank=0"


def ask(authorization: str, target: str = TARGET, method: str = "GET") -> int:
    """The status with which an instance at 10.0.0.5:30000, with a key, answers."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(b"authorization", authorization.encode())],
    }
    access = AccessMiddleware(
        app, "key", None, OriginCheck("10.0.0.5", ()), lambda: None, {"10.0.0.5:30000", "host:30000"}
    )
    asyncio.run(access(scope, receive, send))
    return statuses[0]


def test_a_proof_is_good_for_one_request_to_one_server() -> None:
    assert ask(make_proof("key", "GET", "10.0.0.5:30000", TARGET)) == 200
    assert ask(make_proof("key", "GET", "HOST:30000", TARGET)) == 200
    assert ask(make_proof("other", "GET", "10.0.0.5:30000", TARGET)) == 401
    assert ask(make_proof("key", "GET", "10.0.0.6:30000", TARGET)) == 401, "made for a stranger, who hands it on"
    assert ask(make_proof("key", "POST", "10.0.0.5:30000", TARGET)) == 401
    assert ask(make_proof("key", "GET", "10.0.0.5:30000", "/x")) == 401
    generate = make_proof("key", "POST", "10.0.0.5:30000", "/generate")
    assert ask(generate, "/generate", "POST") == 401, "users show the key"
    assert ask("Bearer key") == 200 and ask("Bearer other") == 401
    for broken in ("Ramet-Proof", "Ramet-Proof x:y", "Ramet-Proof :", "Basic eA=="):
        assert ask(broken) == 401


def test_a_proof_does_not_hold_the_key() -> None:
    first, second = (make_proof("key", "GET", "a:1", "/") for _ in range(2))
    assert first != second and "key" not in first
    assert is_proof(first, "key", "GET", ["a:1"], "/")


def test_the_addresses_of_an_instance() -> None:
    assert ServerArgs(model_path="m", host="::1", port=5).authorities == {"[::1]:5"}
    assert "127.0.0.1:5" in ServerArgs(model_path="m", host="0.0.0.0", port=5).authorities
