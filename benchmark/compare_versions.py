"""Two checkouts of Ramet beside each other: starts, clones, decoding, throughput, and whether the tokens are equal.

    python benchmark/compare_versions.py --before FOLDER [--after FOLDER] [--rounds 5] [-- more flags for the servers]

FOLDER is a checkout, in most cases a git worktree of the commit before a change. The two take turns, each first in
every other round, on an otherwise idle machine, with this environment's packages. Given the same checkout twice, the
ratios show the noise. Decoding is greedy; tokens are compared of requests that run alone, because what a batch rounds
in bfloat16 depends on who else is in it.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from bench_common import (
    MODEL_VOCAB,
    ROOT,
    Server,
    bench_model,
    make_parser,
    random_prompt,
    read_weights,
    report,
    running,
    running_metadata_server,
)

PROMPT_LEN, OUTPUT_LEN, NUM_ALONE, NUM_AT_ONCE = 64, 32, 2, 16
REMOTE = ["--load-format", "remote_instance", "--remote-instance-weight-loader-fallback"]


def generate(server: Server, prompt: list[int]) -> list[int]:
    """Greedy token ids after a prompt."""
    params = {"temperature": 0, "max_new_tokens": OUTPUT_LEN, "ignore_eos": True}
    return server.call("/generate", {"input_ids": prompt, "sampling_params": params})["output_ids"]


def measure_serving(server: Server, seed: int) -> dict[str, Any]:
    """Tokens per second of one request and of several at once, and what they were."""
    generator = random.Random(seed)
    prompts = [random_prompt(PROMPT_LEN, MODEL_VOCAB, generator) for _ in range(1 + NUM_AT_ONCE)]
    tokens = [generate(server, prompts[0])]
    server.call("/flush_cache", {})
    start = time.perf_counter()
    tokens += [generate(server, prompt) for prompt in prompts[:NUM_ALONE]]
    one_s = (time.perf_counter() - start) / NUM_ALONE
    server.call("/flush_cache", {})
    start = time.perf_counter()
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(lambda prompt: generate(server, prompt), prompts[1:]))
    many_s = time.perf_counter() - start
    return {"one": OUTPUT_LEN / one_s, "many": NUM_AT_ONCE * OUTPUT_LEN / many_s, "tokens": tokens}


def measure_round(checkout: Path, model: Path, flags: list[str], seed: int) -> dict[str, Any]:
    """One seed from files, a clone of it by address, its answers, and two replicas that find each other."""
    os.environ["PYTHONPATH"] = str(checkout / "python")
    read_weights(model)
    with running(model, "--remote-instance-weight-loader-start-seed-via-transfer-engine", *flags) as server:
        address = ["--remote-instance-weight-loader-seed-instance-ip", f"127.0.0.1:{server.port}"]
        found: dict[str, Any] = {"seed_s": server.ready_s}
        with running(model, *REMOTE, "error", *address, *flags) as client:
            found["client_s"], found["client_load"] = client.ready_s, client.rank_info()["load_report"]
        copied = ["--remote-instance-weight-loader-local-mode", "off"]
        with running(model, *REMOTE, "error", *address, *copied, *flags) as client:
            found["transfer_load"] = client.rank_info()["load_report"]
        found |= measure_serving(server, seed)
    with (
        tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder,
        running_metadata_server(Path(folder)) as metadata,
    ):
        express = ["--remote-instance-weight-loader-backend", "modelexpress"]
        express += ["--modelexpress-config", json.dumps({"url": metadata.address})]
        read_weights(model)
        with (
            running(model, *REMOTE, "disk", *express, *flags) as first,
            running(model, *REMOTE, "error", *express, *flags) as second,
        ):
            found["express_first_s"], found["express_client_s"] = first.ready_s, second.ready_s
            found["express_load"] = second.rank_info()["load_report"]
    return found


def check_loads(found: dict[str, Any]) -> None:
    """Raise RuntimeError if a clone did not come from an instance."""
    for name in ("client_load", "transfer_load", "express_load"):
        load = found[name]
        if not load["verified"] or load["fallback_reason"] or load["source"] == "checkpoint":
            raise RuntimeError(f"{name}: these weights are no verified clone: {load}")


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout that is compared; this one when not given")
    parser.add_argument("--rounds", type=int, default=5)
    args: argparse.Namespace = parser.parse_args()
    model = bench_model(args.model_path)
    checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
    rounds: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    equal = True
    for number in range(args.rounds):
        for side in ("before", "after") if number % 2 == 0 else ("after", "before"):
            found = measure_round(checkouts[side], model, args.server_flags, number)
            check_loads(found)
            rounds[side].append(found)
        equal = equal and rounds["before"][-1].pop("tokens") == rounds["after"][-1].pop("tokens")
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)

    rows = []
    values: dict[str, Any] = {"rounds": rounds, "equal_tokens": equal}
    for label, unit, get in (
        ("seed from files: launch to /health", "s", lambda r: r["seed_s"]),
        ("client by address: launch to /health", "s", lambda r: r["client_s"]),
        ("client by address: the load", "s", lambda r: r["client_load"]["seconds"]),
        ("client by address, network transport: the load", "s", lambda r: r["transfer_load"]["seconds"]),
        ("first of two through ModelExpress: launch to /health", "s", lambda r: r["express_first_s"]),
        ("second of two through ModelExpress: launch to /health", "s", lambda r: r["express_client_s"]),
        ("second of two through ModelExpress: the load", "s", lambda r: r["express_load"]["seconds"]),
        (f"one request at a time, {PROMPT_LEN} in, {OUTPUT_LEN} out", "tokens/s", lambda r: r["one"]),
        (f"{NUM_AT_ONCE} requests at once", "tokens/s", lambda r: r["many"]),
    ):
        before, after = ([get(r) for r in rounds[side]] for side in ("before", "after"))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((label, f"{median(before):8.3f} -> {median(after):8.3f} {unit}, x {median(ratios):.3f} ({spread})"))
        values[label] = {"before": median(before), "after": median(after), "ratio": median(ratios)}
    rows.append(("greedy tokens", "equal" if equal else "DIFFERENT"))
    report("two versions beside each other", args.output, rows, values)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
