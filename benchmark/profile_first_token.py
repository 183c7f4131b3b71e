"""One request's way to its first token, with the time of each hop: where the milliseconds outside of the model are.

    python benchmark/profile_first_token.py [--device cuda] [--model-path FOLDER] [--requests 30] [--beside CHECKOUT]

Requests of 128 tokens in and 1 out, one after the other, over /generate and /v1/completions, by token ids and as text,
streamed and not; each prompt is new. The client is a plain socket. The hops are noted by benchmark/hops, which every
process of the server loads; a hop costs some 2 µs for that. --beside starts a second server from another checkout: the
requests take turns, so that what else the machine does is the same for both.

"in" is from the send to the scheduler's receive, "model" from there to the token, "out" from the token to the end of
the client's read. The model on a GPU is a random one in the shape of Qwen3-8B, on a CPU the demo model.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, Server, percentile, random_prompt, report, running
from gpu_model import SHAPE, make_model

HOPS_FOLDER = Path(__file__).resolve().parent / "hops"
SENT, READ, ENDED = "client sends", "client reads", "client has all"
HOPS = (
    SENT, "request received", "headers read", "body read", "body validated", "prompt tokenised",
    "request made", "the scheduler has it", "pass planned", "pass launched", "token known", "output made",
    "the detokenizer has it", "text made", "the main process has it", "answer made", READ, ENDED,
)  # fmt: skip
PARTS = {
    "in": (SENT, "the scheduler has it"),
    "model": ("the scheduler has it", "token known"),
    "out": ("token known", ENDED),
}
NUM_WARM_UP = 5
TIMEOUT_S = 60.0
END_OF_CHUNKS = b"\r\n0\r\n\r\n"


class PlainClient:
    """One connection that is kept, and nothing that takes time."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, path: str, body: bytes) -> tuple[dict[str, int], bytes]:
        """When the request was sent, and its answer's first and last byte were read; and the answer.

        Raises:
            RuntimeError: if it is no success.
        """
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
        sent, read, data = time.monotonic_ns(), 0, b""
        self._socket.sendall(request)
        while not _is_whole(data):
            piece = self._socket.recv(1 << 16)
            data += piece
            if not read and data.partition(b"\r\n\r\n")[2]:  # more than the headers
                read = time.monotonic_ns()
            if not piece:
                break
        ended = time.monotonic_ns()
        if not data.startswith(b"HTTP/1.1 200") or not _is_whole(data):
            raise RuntimeError(f"{path}: {data[:500]!r}")
        return {SENT: sent, READ: read, ENDED: ended}, data.partition(b"\r\n\r\n")[2]

    def close(self) -> None:
        self._socket.close()


def _is_whole(data: bytes) -> bool:
    head, gap, body = data.partition(b"\r\n\r\n")
    if b"chunked" in head:
        return data.endswith(END_OF_CHUNKS)
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    return bool(gap) and len(body) >= int(length.partition(b":")[2])


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of request."""

    path: str
    is_text: bool
    is_streamed: bool

    @property
    def name(self) -> str:
        return f"{self.path} {'text' if self.is_text else 'ids'}{' streamed' if self.is_streamed else ''}"

    def body(self, model: str, prompt: list[int] | str) -> bytes:
        fields: dict[str, Any]
        if self.path == "/generate":
            sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
            fields = {"text" if self.is_text else "input_ids": prompt, "sampling_params": sampling}
        else:
            fields = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 1, "ignore_eos": True}
        return json.dumps(fields | {"stream": self.is_streamed}).encode()


KINDS = [
    Kind(path, is_text, is_streamed)
    for path in ("/generate", "/v1/completions")
    for is_text in (False, True)
    for is_streamed in (False, True)
]


class Watched:
    """A running server whose hops are noted."""

    def __init__(self, server: Server, hops_file: Path) -> None:
        self._client = PlainClient(server.port)
        self._model = server.call("/v1/models")["data"][0]["id"]
        self._file = hops_file
        self._asked: list[tuple[Kind, dict[str, int]]] = []

    def ask(self, kind: Kind, prompt: list[int] | str, counts: bool) -> None:
        """One request, which counts or only warms the server up."""
        times, _ = self._client.ask(kind.path, kind.body(self._model, prompt))
        if counts:
            self._asked.append((kind, times))

    def close(self) -> None:
        self._client.close()

    def ways(self) -> dict[str, list[dict[str, int]]]:
        """Of each kind of request, the times of its hops in nanoseconds: the first, where a request came by twice.

        Raises:
            RuntimeError: if a request has not been seen at a hop.
        """
        noted = []
        for line in self._file.read_text().splitlines():
            hop, _, when = line.rpartition(" ")
            noted.append((int(when), hop))
        noted.sort()
        ways: dict[str, list[dict[str, int]]] = {}
        place = 0
        for kind, times in self._asked:
            way = dict(times)
            while place < len(noted) and noted[place][0] < times[SENT]:
                place += 1
            while place < len(noted) and noted[place][0] <= times[ENDED]:
                way.setdefault(noted[place][1], noted[place][0])
                place += 1
            if missing := [hop for hop in HOPS if hop not in way]:
                raise RuntimeError(f"{kind.name}: a request was not seen at: {', '.join(missing)}")
            ways.setdefault(kind.name, []).append(way)
        return ways


@contextlib.contextmanager
def watched(folder: Path, checkout: Path, flags: Sequence[str], hops_file: Path) -> Iterator[Watched]:
    """A server from a checkout for the length of a with block."""
    wanted = {
        "HOPS_FILE": str(hops_file),
        "PYTHONPATH": os.pathsep.join(map(str, (checkout / "python", HOPS_FOLDER))),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(running(folder, *flags))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        yield stack.enter_context(contextlib.closing(Watched(server, hops_file)))


def follow(servers: Sequence[Watched], make_prompt: Callable[[Kind], list[int] | str], num_requests: int) -> None:
    """Ask every server the same, by turns."""
    for number in range(NUM_WARM_UP + num_requests):
        for kind in KINDS:
            prompt = make_prompt(kind)
            for server in servers if number % 2 else servers[::-1]:
                server.ask(kind, prompt, counts=number >= NUM_WARM_UP)


def spans(ways: Sequence[dict[str, int]]) -> dict[str, list[float]]:
    """Milliseconds from each hop to the next, of the parts, and of the whole, for every request."""
    pairs = {later: (hop, later) for hop, later in zip(HOPS, HOPS[1:], strict=False)}
    pairs |= PARTS | {"whole": (SENT, ENDED)}
    found = {name: [(way[end] - way[begin]) / 1e6 for way in ways] for name, (begin, end) in pairs.items()}
    return found | {"in and out": [one + two for one, two in zip(found["in"], found["out"], strict=True)]}


def to_rows(spans_of: dict[str, list[float]]) -> list[tuple[str, str]]:
    """The spans for people."""
    names = [*HOPS[1:], *PARTS, "in and out", "whole"]
    return [
        (name, f"{statistics.median(spans_of[name]):8.3f} ms   p90 {percentile(spans_of[name], 0.9):8.3f}")
        for name in names
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="model folder; when not given, see above")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one, when not given")
    parser.add_argument("--input-len", type=int, default=128, help="tokens")
    parser.add_argument("--requests", type=int, default=30, help="of each kind")
    parser.add_argument("--beside", type=Path, help="another checkout, whose server is asked by turns")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the server")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    import torch
    from ramet.srt.text.tokenizer import Tokenizer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model_path is not None:
        folder = args.model_path
    else:
        folder = make_model(RESULTS / "model-8b", SHAPE) if device == "cuda" else ROOT / "examples" / "demo_model"
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer, generator = Tokenizer.from_path(folder), random.Random(0)

    def make_prompt(kind: Kind) -> list[int] | str:
        ids = random_prompt(args.input_len, vocab_size, generator)
        return tokenizer.decode(ids) if kind.is_text else ids

    flags = ["--device", device, "--max-total-tokens", "16384", *args.server_flags]
    checkouts = {"this checkout": ROOT} | ({} if args.beside is None else {str(args.beside): args.beside})
    with contextlib.ExitStack() as stack:
        notes = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            name: stack.enter_context(watched(folder, checkout.resolve(), flags, notes / f"hops-{number}"))
            for number, (name, checkout) in enumerate(checkouts.items())
        }
        follow(list(servers.values()), make_prompt, args.requests)
        found = {name: {kind: spans(ways) for kind, ways in server.ways().items()} for name, server in servers.items()}
    rows = []
    for name, kinds in found.items():
        for kind, spans_of in kinds.items():
            rows += [(f"{name}: {kind}", "median"), *to_rows(spans_of)]
    report("first token", args.output, rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
