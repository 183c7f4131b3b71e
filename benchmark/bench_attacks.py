"""What one caller can do to others: p99 of small requests and of health checks, quiet and while each attack runs.

Starts an instance of a small random model, and for each attack asks it for 16 tokens and for /health, in turns, while
the attack goes on from threads of another process. An attack is a function in ATTACKS that does its harm once; it is
called again and again. The goal is a ratio of at most 2.

Each attack is compared with the quiet times around it: half of them before it, half after it.

    python benchmark/bench_attacks.py [--only NAME …] [--seconds 10] [--output FILE] [-- SERVER FLAGS]
"""

import argparse
import contextlib
import functools
import http.client
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import attacks_grammar
from bench_common import ROOT, Server, percentile, report, running

NUM_TOKENS = 16
NUM_ATTACKERS = 2  # threads
PAUSE_S = 0.01
SETTLE_S = 3.0  # in which what an attack has begun comes to its end
ATTACK_TIMEOUT_S = 60.0
GENERATE, CHAT, COMPLETIONS = "/generate", "/v1/chat/completions", "/v1/completions"
CHECKSUMS = "/remote_instance_weight_checksums"
MODEL = "attacked"
SEED_FLAG = "--remote-instance-weight-loader-start-seed-via-transfer-engine"


BODIES: dict[CodeType, bytes] = {}


class Target(NamedTuple):
    """Where the instance listens."""

    port: int
    tensor: str  # the name of a checkpoint tensor, and
    extents: tuple[int, ...]  # its shape


def post(target: Target, path: str, make_body: Callable[[], bytes]) -> int:
    """The status of the answer; 0 if the server has broken the connection off. The body is made once for a place."""
    body = BODIES.get(place := make_body.__code__)
    if body is None:
        body = BODIES[place] = make_body()
    return ask(target, "POST", path, body)


def ask(target: Target, method: str, path: str, data: bytes | None) -> int:
    """The status of one answer, on a new connection; 0 if the server has broken it off."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=ATTACK_TIMEOUT_S)
    try:
        connection.request(method, path, data, {} if data is None else {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def repeated(item: str, number: int) -> str:
    """A JSON list of `number` times the same."""
    return "[" + ",".join([item] * number) + "]"


def join_numbered(pattern: str, number: int) -> str:
    """`pattern` with the numbers from 0 on, joined by commas."""
    return ",".join(pattern.format(one) for one in range(number))


def chat(content: str, more: str = "") -> bytes:
    return f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": {content}}}]{more}}}'.encode()


# ---- attacks: large bodies ----


def float_ids(target: Target) -> int:
    return post(target, GENERATE, lambda: f'{{"input_ids": {repeated("1.0", 5_000_000)}}}'.encode())


def fewer_float_ids(target: Target) -> int:
    return post(target, GENERATE, lambda: f'{{"input_ids": {repeated("1.0", 500_000)}}}'.encode())


def half_ids(target: Target) -> int:
    return post(target, GENERATE, lambda: f'{{"input_ids": {repeated("1.5", 1900)}}}'.encode())


def integer_ids(target: Target) -> int:
    return post(target, GENERATE, lambda: f'{{"input_ids": {repeated("5", 25_000_000)}}}'.encode())


def fewer_integer_ids(target: Target) -> int:
    return post(target, GENERATE, lambda: f'{{"input_ids": {repeated("5", 1_000_000)}}}'.encode())


def metadata_keys(target: Target) -> int:
    entries = functools.partial(join_numbered, '"{}": "x"', 1_000_000)
    return post(target, CHAT, lambda: chat('"hi"', f', "metadata": {{{entries()}}}'))


def text_parts(target: Target) -> int:
    return post(target, CHAT, lambda: chat(repeated('{"type": "text", "text": "x"}', 200_000)))


def wrong_parts(target: Target) -> int:
    return post(target, CHAT, lambda: chat(repeated("{}", 100_000)))


def many_messages(target: Target) -> int:
    messages = functools.partial(repeated, '{"role": "user", "content": "x"}', 100_000)
    return post(target, CHAT, lambda: f'{{"model": "{MODEL}", "messages": {messages()}}}'.encode())


def many_prompts(target: Target) -> int:
    prompts = functools.partial(repeated, '"x"', 100_000)
    return post(target, GENERATE, lambda: f'{{"text": {prompts()}}}'.encode())


def many_stops(target: Target) -> int:
    stops = functools.partial(repeated, '"x"', 500_000)
    return post(target, GENERATE, lambda: f'{{"text": "x", "sampling_params": {{"stop": {stops()}}}}}'.encode())


def many_biases(target: Target) -> int:
    entries = functools.partial(join_numbered, '"{}": 1', 1_000_000)
    head = f'{{"model": "{MODEL}", "prompt": "x", "logit_bias": '
    return post(target, COMPLETIONS, lambda: f"{head}{{{entries()}}}}}".encode())


def many_tools(target: Target) -> int:
    return post(target, CHAT, lambda: chat('"hi"', f', "tools": {repeated("{}", 500_000)}'))


def unknown_fields(target: Target) -> int:
    entries = functools.partial(join_numbered, '"x{}": 1', 500_000)
    return post(target, GENERATE, lambda: f'{{"text": "x", {entries()}}}'.encode())


def empty_lists(target: Target) -> int:
    return post(target, GENERATE, lambda: f'{{"input_ids": {repeated("[]", 20_000_000)}}}'.encode())


def deep_nesting(target: Target) -> int:
    return post(target, GENERATE, lambda: b'{"input_ids": ' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}")


def one_letter(target: Target) -> int:
    return post(target, GENERATE, lambda: json.dumps({"text": "a" * 1_000_000}).encode())


def spaces(target: Target) -> int:
    return post(target, GENERATE, lambda: json.dumps({"text": " " * 60_000_000}).encode())


def letters_that_may_fit(target: Target) -> int:
    return post(target, GENERATE, lambda: json.dumps({"text": "a" * 60_000}).encode())


def large_number(target: Target) -> int:
    head = b'{"text": "x", "sampling_params": {"temperature": '
    return post(target, GENERATE, lambda: head + b"9" * 4_000_000 + b"}}")


# ---- attacks: connections ----


def open_many(target: Target, number: int, data: bytes) -> list[socket.socket]:
    """Connections that have sent some data, as many as there can be."""
    open_sockets: list[socket.socket] = []
    with contextlib.suppress(OSError):
        for _ in range(number):
            open_sockets.append(socket.create_connection(("127.0.0.1", target.port), timeout=5))
            open_sockets[-1].sendall(data)
    return open_sockets


def half_sent_headers(target: Target) -> int:
    """A thousand connections that send a letter of a header now and then."""
    open_sockets = open_many(target, 1000, b"POST /generate HTTP/1.1\r\nHost: x")
    for _ in range(3):
        time.sleep(1)
        for one in open_sockets:
            with contextlib.suppress(OSError):
                one.sendall(b"x")
    for one in open_sockets:
        one.close()
    return len(open_sockets)


def half_sent_bodies(target: Target) -> int:
    head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    open_sockets = open_many(target, 500, head + b"Content-Length: 60000000\r\n\r\n" + b"{" * 100_000)
    time.sleep(2)
    for one in open_sockets:
        one.close()
    return len(open_sockets)


def tiny_chunks(target: Target) -> int:
    with socket.create_connection(("127.0.0.1", target.port), timeout=5) as one, contextlib.suppress(OSError):
        head = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        one.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            one.sendall(b"1\r\n \r\n" * 100_000)
        return 1
    return 0


def many_headers(target: Target) -> int:
    with socket.create_connection(("127.0.0.1", target.port), timeout=5) as one, contextlib.suppress(OSError):
        one.sendall(b"GET /get_model_info HTTP/1.1\r\n" + b"a: b\r\n" * 1_000_000 + b"\r\n")
        return 1
    return 0


def pipelined(target: Target) -> int:
    with socket.create_connection(("127.0.0.1", target.port), timeout=5) as one, contextlib.suppress(OSError):
        one.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000)
        return 1
    return 0


def streams_nobody_reads(target: Target) -> int:
    """Twenty streams whose readers never read."""
    body = json.dumps(
        {"text": "x", "stream": True, "return_logprob": True, "top_logprobs_num": 20,
         "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
    ).encode()  # fmt: skip
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", target.port), timeout=5) as one, contextlib.suppress(OSError):
        one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(2)
        return 1
    return 0


# ---- attacks: weights ----


def slices(target: Target, number: int) -> bytes:
    """The body that asks for checksums of so many slices of a tensor: its rows from some column on."""
    rows, columns = target.extents
    regions = [[target.tensor, [[n % rows, n % rows + 1], [n // rows % columns, columns]]] for n in range(number)]
    return json.dumps({"rank": 0, "regions": regions}).encode()


def many_slices(target: Target) -> int:
    return post(target, CHECKSUMS, lambda: slices(target, 300_000))


def some_slices(target: Target) -> int:
    return post(target, CHECKSUMS, lambda: slices(target, 4000))


ATTACKS: list[Callable[[Target], int]] = [
    float_ids,
    fewer_float_ids,
    half_ids,
    integer_ids,
    fewer_integer_ids,
    metadata_keys,
    text_parts,
    wrong_parts,
    many_messages,
    many_prompts,
    many_stops,
    many_biases,
    many_tools,
    unknown_fields,
    empty_lists,
    deep_nesting,
    one_letter,
    spaces,
    letters_that_may_fit,
    large_number,
    half_sent_headers,
    half_sent_bodies,
    tiny_chunks,
    many_headers,
    pipelined,
    streams_nobody_reads,
    many_slices,
    some_slices,
]


# ---- measuring ----


def attack_once(name: str, target: Target) -> int | str:
    """The status that the attack got, or what came instead."""
    if name not in attacks_grammar.ATTACKS:
        return next(attack for attack in ATTACKS if attack.__name__ == name)(target)
    status = attacks_grammar.ATTACKS[name](f"http://127.0.0.1:{target.port}").split()[0]
    return int(status) if status.isdigit() else status


def attack_forever(name: str, target: Target, results: Any) -> None:
    """What the attacking process does until it is killed. Bodies are made beside, by those who attack."""
    os.nice(19)  # the attacker's own work is not what is measured

    def repeat() -> None:
        while True:
            try:
                results.put(attack_once(name, target))
            except OSError as error:
                results.put(repr(error))
            time.sleep(PAUSE_S)

    for _ in range(NUM_ATTACKERS - 1):
        threading.Thread(target=repeat, daemon=True).start()
    repeat()


class Times(NamedTuple):
    """Seconds of each call; a call that failed took forever."""

    tokens: list[float]
    health: list[float]


def measure(target: Target, seconds: float) -> Times:
    """Ask for tokens and for the health in turns, each on a new connection."""
    body = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}}
    times = Times([], [])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for method, path, data, kept in (
            ("POST", GENERATE, json.dumps(body).encode(), times.tokens),
            ("GET", "/health", None, times.health),
        ):
            start = time.perf_counter()
            kept.append(time.perf_counter() - start if ask(target, method, path, data) == 200 else float("inf"))
            time.sleep(0.005)
    return times


def measure_attack(server: Server, target: Target, name: str, seconds: float) -> tuple[Times, list]:
    """The times while the attack runs, and what the attacker has got."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    attacker = context.Process(target=attack_forever, args=(name, target, results), daemon=True)
    attacker.start()
    time.sleep(0.5)
    try:
        times = measure(target, seconds)
    finally:
        attacker.kill()
        attacker.join()
    got = []
    while not results.empty():
        got.append(results.get())
    if server.process.poll() is not None:
        raise RuntimeError(f"{name} has ended the server:\n{server.log_path.read_text()[-2000:]}")
    return times, got


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def describe(times: Times, quiet: Times) -> tuple[str, dict[str, float]]:
    values: dict[str, float] = {}
    parts = []
    for name in Times._fields:
        for share in (0.5, 0.99):
            now, before = (percentile(getattr(one, name), share) * 1e3 for one in (times, quiet))
            label = f"p{100 * share:g}"
            values |= {f"{name}_{label}_ms": now, f"{name}_{label}_ratio": now / before}
            parts.append(f"{name} {label} {before:6.1f} -> {now:6.1f} ms (x {now / before:4.2f})")
    return ", ".join(parts), values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, help="model folder; a small random one when not given")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each attack")
    parser.add_argument("--only", nargs="*", default=[], help="names of attacks")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the server")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    names = [*(attack.__name__ for attack in ATTACKS), *attacks_grammar.ATTACKS]
    chosen = args.only or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--only: unknown {', '.join(unknown)}; known are {', '.join(names)}")
    rows: list[tuple[str, str]] = []
    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = args.model_path or small_model(Path(folder))
        with running(model, "--served-model-name", MODEL, SEED_FLAG, *args.server_flags) as server:
            target = find_target(server)
            measure(target, 1.0)
            before = measure(target, args.seconds / 2)
            for name in chosen:
                times, got = measure_attack(server, target, name, args.seconds)
                time.sleep(SETTLE_S)
                after = measure(target, args.seconds / 2)
                quiet = Times(before.tokens + after.tokens, before.health + after.health)
                text, values[name] = describe(times, quiet)
                answers = ", ".join(f"{one}: {got.count(one)}" for one in sorted(set(got), key=str))
                rows.append((name, f"{text}; main process {rss_mb(server.process.pid):.0f} MB; {answers}"))
                print(*rows[-1], file=sys.stderr, flush=True)
                before = after
    report("attacks: what others notice", args.output, rows, values)


def small_model(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "test"))
    from random_models import make_model

    return make_model(folder, "llama3", max_position_embeddings=4096)


def find_target(server: Server) -> Target:
    """The port, and a tensor of the instance's weights."""
    manifest = server.call("/remote_instance_transfer_engine_info?rank=0")["manifest"]
    box = manifest["entries"][0]["boxes"][0]
    name, source = (box["checkpoint_name"], box["source"]) if isinstance(box, dict) else (box[0], box[1])
    return Target(server.port, name, tuple(stop - start for start, stop in source))


if __name__ == "__main__":
    main()
