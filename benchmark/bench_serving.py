"""A load generator: streams /generate from a running server and reports latency percentiles and throughput.

    python benchmark/bench_serving.py --url http://127.0.0.1:30000 [--num-requests 64] [--concurrency 16]
        [--input-len 128] [--output-len 64] [--shared-prefix-len 0] [--request-rate inf] [--abort-share 0]

Without --url it starts a server with the benchmark's model. TTFT is the time to the first event with a token, ITL the
time between two events divided by the tokens that the second one brought. --abort-share closes that share of the
connections after their first token; those count as aborted, not as failed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import random
import sys
import time

import aiohttp
from bench_common import MODEL_VOCAB, bench_model, make_parser, percentile, random_prompt, report, running

REQUEST_TIMEOUT_S = 900.0


@dataclasses.dataclass
class Outcome:
    """What became of one request."""

    status: str = "failed"  # "done", "aborted" or "failed"
    error: str = ""
    ttft_s: float = math.nan
    e2e_s: float = math.nan
    num_output_tokens: int = 0
    itl_s: list[float] = dataclasses.field(default_factory=list)  # one per output token after the first event


async def stream_one(session: aiohttp.ClientSession, url: str, body: dict, abort: bool) -> Outcome:
    """Send one request and read its events to the end, or to the first token when it is to be aborted."""
    outcome = Outcome()
    start = last = time.perf_counter()
    try:
        async with session.post(url + "/generate", json=body) as response:
            if response.status != 200:
                outcome.error = f"{response.status}: {(await response.text())[:200]}"
                return outcome
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event, now = json.loads(line[6:]), time.perf_counter()
                if "error" in event:
                    outcome.error = str(event["error"])
                    return outcome
                new = event["meta_info"]["completion_tokens"] - outcome.num_output_tokens
                if new > 0:
                    if outcome.num_output_tokens == 0:
                        outcome.ttft_s = now - start
                    else:
                        outcome.itl_s += [(now - last) / new] * new
                    outcome.num_output_tokens += new
                    last = now
                if abort and outcome.num_output_tokens:
                    outcome.status = "aborted"
                    return outcome
                if (event["meta_info"].get("finish_reason") or {}).get("type") == "abort":
                    outcome.error = str(event["meta_info"]["finish_reason"])
                    return outcome
            outcome.status, outcome.e2e_s = "done", time.perf_counter() - start
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def run_load(url: str, args: argparse.Namespace) -> tuple[list[Outcome], float]:
    """All requests, at most args.concurrency at a time. Returns the outcomes and the seconds they took together."""
    generator = random.Random(args.seed)
    prefix = random_prompt(args.shared_prefix_len, args.vocab_size, generator)
    limit = asyncio.Semaphore(args.concurrency)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)

    async def one(body: dict, abort: bool) -> Outcome:
        async with limit:
            return await stream_one(session, url, body, abort)

    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
        start, tasks = time.perf_counter(), []
        for _ in range(args.num_requests):
            prompt = prefix + random_prompt(args.input_len - len(prefix), args.vocab_size, generator)
            sampling = {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}
            body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
            tasks.append(asyncio.create_task(one(body, generator.random() < args.abort_share)))
            if math.isfinite(args.request_rate):
                await asyncio.sleep(generator.expovariate(args.request_rate))
        outcomes = await asyncio.gather(*tasks)
        return list(outcomes), time.perf_counter() - start


def summarize(outcomes: list[Outcome], seconds: float, args: argparse.Namespace) -> tuple[list, dict]:
    """The result as rows for people and values for programs."""
    done = [outcome for outcome in outcomes if outcome.status == "done"]
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "aborted", "failed")}
    num_output = sum(outcome.num_output_tokens for outcome in outcomes)
    values = {"counts": counts, "seconds": seconds, "output_tokens_per_s": num_output / seconds}
    rows = [
        ("requests", ", ".join(f"{count} {status}" for status, count in counts.items())),
        ("load", f"{args.concurrency} at a time, {args.input_len} tokens in, {args.output_len} out"),
        ("output", f"{num_output / seconds:.1f} tokens/s"),
        ("input and output", f"{(num_output + len(done) * args.input_len) / seconds:.1f} tokens/s"),
    ]
    series = {
        "TTFT": [outcome.ttft_s for outcome in done],
        "ITL": [itl for outcome in done for itl in outcome.itl_s],
        "end to end": [outcome.e2e_s for outcome in done],
    }
    for label, samples in series.items():
        cuts = {f"p{round(100 * share)}": percentile(samples, share) * 1e3 for share in (0.5, 0.9, 0.99)}
        rows.append((label, "   ".join(f"{cut} {value:.1f} ms" for cut, value in cuts.items())))
        values[label] = cuts
    return rows, values


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--url", help="a running server; one is started when not given")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--shared-prefix-len", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--request-rate", type=float, default=math.inf, help="mean arrivals per second (Poisson)")
    parser.add_argument("--abort-share", type=float, default=0.0, help="share of requests closed after one token")
    parser.add_argument("--vocab-size", type=int, default=MODEL_VOCAB, help="prompts are random ids below it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.shared_prefix_len > args.input_len:
        parser.error("--shared-prefix-len must not be above --input-len")
    with contextlib.ExitStack() as stack:
        url = args.url
        if url is None:
            url = stack.enter_context(running(bench_model(args.model_path), *args.server_flags)).url
        outcomes, seconds = asyncio.run(run_load(url.rstrip("/"), args))
    rows, values = summarize(outcomes, seconds, args)
    report("serving", args.output, rows, values)
    for error in sorted({outcome.error for outcome in outcomes if outcome.error}):
        print(f"  failed: {error}", file=sys.stderr)
    return 1 if values["counts"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
