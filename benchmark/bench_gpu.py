"""What a GPU instance reaches, each figure beside the limit that the same run measures on the same GPU.

    python benchmark/bench_gpu.py [--only limits,decode,throughput,clone] [--work-dir FOLDER]

The model is a random one in the shape of Qwen3-8B (16.4 GB in bfloat16), written to the work folder at the first run.
Limits: a device-to-device copy (bytes read plus written), a bfloat16 product of random matrices. Decode: one request's
token rate over HTTP, against the copy's rate over the weights' bytes. Throughput: that many requests at once, 512
tokens in and 256 out, against the floor: the prompt's operations at the product's rate plus the bytes of weights and
KV cache that decoding reads at the copy's rate. Clone: a second instance takes the weights from the first one, on
another GPU if there is one, while the first one serves: alone, and again and again under load, which gives the seed's
token times. The weights alone are taken again and again too, since one copy is over in 50 ms.
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_common import RESULTS, Server, random_prompt, report
from bench_serving import run_load
from gpu_model import SHAPE, make_model, tensor_shapes
from soak_clones import WeightClones

PARTS = ("limits", "decode", "throughput", "clone")
INPUT_LEN, OUTPUT_LEN = 512, 256
SERVER_FLAGS = ["--max-total-tokens", "300000", "--max-running-requests", "256"]


def empty_gpu() -> None:
    """Give this process's unused GPU memory back, for the servers to take."""
    import torch

    gc.collect()
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            torch.cuda.empty_cache()


@dataclasses.dataclass
class Limits:
    """Bytes and operations per second of this GPU."""

    copy: float  # read plus written
    product: float  # bfloat16
    peer_copy: float  # bytes copied, to where a clone runs: another GPU, or the same one

    @classmethod
    def measure(cls) -> "Limits":
        import torch
        from gpu_timing import time_on

        def rate(amount: float, function: Callable[[], Any]) -> float:
            return amount / statistics.median(time_on(device, function, 10))

        device = torch.device("cuda", 0)
        source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = rate(2 * source.nbytes, lambda: target.copy_(source))
        peer_copy = copy / 2
        if torch.cuda.device_count() > 1:
            peer = torch.empty_like(source, device="cuda:1")
            peer_copy = rate(source.nbytes, lambda: peer.copy_(source))
        a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
        return cls(copy, rate(2 * 8192**3, lambda: a @ b), peer_copy)

    def floor_s(self, config: dict[str, Any], num_requests: int) -> float:
        """Seconds that so many requests take at least, by the rule in the issue."""
        shapes = tensor_shapes(config)
        sizes = {name: shape[0] * shape[-1] for name, shape in shapes.items() if len(shape) == 2}
        num_weights = sum(sizes.values())
        num_active = num_weights - sizes["model.embed_tokens.weight"] - sizes["lm_head.weight"]
        prefill = num_requests * INPUT_LEN * 2 * num_active / self.product
        kv_bytes = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2
        mean_len = INPUT_LEN + OUTPUT_LEN / 2
        step_bytes = 2 * num_weights + num_requests * mean_len * kv_bytes
        return prefill + OUTPUT_LEN * step_bytes / self.copy


Rows = list[tuple[str, str]]


def measure_decode(server: Server, limits: Limits, config: dict[str, Any], rows: Rows, values: dict[str, Any]) -> None:
    """One request's token rate: the time of a whole answer less that of its first token."""
    generator = random.Random(0)

    def ask(length: int) -> float:
        prompt = random_prompt(128, config["vocab_size"], generator)
        sampling = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
        start = time.perf_counter()
        server.call("/generate", {"input_ids": prompt, "sampling_params": sampling})
        return time.perf_counter() - start

    ask(8)
    first = statistics.median(ask(1) for _ in range(5))
    whole = statistics.median(ask(OUTPUT_LEN + 1) for _ in range(3))
    rate = OUTPUT_LEN / (whole - first)
    num_bytes = 2 * sum(shape[0] * shape[-1] for shape in tensor_shapes(config).values() if len(shape) == 2)
    limit = limits.copy / num_bytes
    rows.append(("first token", f"{first * 1e3:.1f} ms, 128 tokens in"))
    rows.append(("decode at batch 1", f"{rate:.1f} tokens/s; {rate / limit:.0%} of {limit:.1f}"))
    values |= {"decode": rate, "decode_limit": limit, "first_token_s": first}


def measure_throughput(
    server: Server, limits: Limits, config: dict[str, Any], rows: Rows, values: dict[str, Any]
) -> None:
    for count in (64, 256):
        load = argparse.Namespace(
            seed=count, num_requests=count, concurrency=count, input_len=INPUT_LEN, output_len=OUTPUT_LEN,
            shared_prefix_len=0, vocab_size=config["vocab_size"], abort_share=0.0, request_rate=float("inf"),
        )  # fmt: skip
        asyncio.run(run_load(server.url, argparse.Namespace(**(vars(load) | {"seed": 1, "output_len": 4}))))
        outcomes, seconds = asyncio.run(run_load(server.url, load))
        done = sum(outcome.num_output_tokens for outcome in outcomes if outcome.status == "done")
        floor = count * OUTPUT_LEN / limits.floor_s(config, count)
        rows.append(
            (f"{count} concurrent", f"{done / seconds:.0f} tokens/s; {done / seconds / floor:.0%} of {floor:.0f}")
        )
        values[f"throughput_{count}"] = {"tokens_per_s": done / seconds, "floor": floor}


def measure_clone(seed: Server, folder: Path, limits: Limits, config: dict, rows: Rows, values: dict[str, Any]) -> None:
    """Start clients from a serving seed: launch to first token, the transfer's rate, the seed's token times."""
    import torch

    gpu_id = torch.cuda.device_count() - 1
    flags = ["--load-format", "remote_instance", "--remote-instance-weight-loader-seed-instance-ip", "127.0.0.1",
             "--remote-instance-weight-loader-seed-instance-service-port", str(seed.port),
             "--remote-instance-weight-loader-fallback", "error", "--base-gpu-id", str(gpu_id),
             *SERVER_FLAGS]  # fmt: skip
    runs: list[dict[str, Any]] = []

    def clone() -> None:
        start = time.monotonic()
        client = Server(folder, *flags)
        client.call("/generate", {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 1}})
        seconds = time.monotonic() - start
        runs.append({"seconds": seconds, "ready_s": client.ready_s, **client.rank_info()})
        client.stop()

    for _ in range(2):
        clone()
    times = measure_token_times(seed, f"cuda:{gpu_id}", config["vocab_size"], folder.parent, clone)
    middle = statistics.median_low(run["seconds"] for run in runs)
    typical = next(run for run in runs if run["seconds"] == middle)
    loads = [run["load_report"] for run in runs]
    rates = [load["num_bytes"] / load["transfer_seconds"] for load in loads if load["source"] == "local_copy"]
    rate = max(rates, default=0.0)
    rows.append(("clone, launch to first token", f"{middle:.2f} s, median of {len(runs)}; phases {typical['phases']}"))
    rows.append(("local transfer", f"{rate / 1e9:.0f} GB/s; {rate / limits.peer_copy:.0%} of a plain copy"))
    for name in ("cloned again and again", "weights taken all the time"):
        ratio = f"{times[name] / times['quiet']:.2f} x without"
        rows.append((f"the seed's p99 token time, {name}", f"{times[name]:.2f} ms; {ratio}"))
    values["clone"] = {"runs": runs, "token_times_ms": times}


def measure_token_times(
    seed: Server, device: str, vocab_size: int, work_dir: Path, clone: Callable[[], None], output_len: int = 1500
) -> dict[str, float]:
    """The seed's p99 token times in milliseconds: quiet, while clones start, while `device` takes weights all the time.

    The load is made by a process of its own, so that nothing but the seed can delay it.
    """
    weights = WeightClones(seed, device, "copy")

    def take() -> None:
        assert weights.take([])["source"] == "local_copy"

    take()  # what is made once
    meanwhile: dict[str, Callable[[], None]] = {
        "quiet": lambda: time.sleep(0.1),
        "cloned again and again": clone,
        "weights taken all the time": take,
    }
    times = {}
    for name, work in meanwhile.items():
        output = work_dir / "token-times.json"
        command = [sys.executable, str(Path(__file__).with_name("bench_serving.py")), "--url", seed.url,
                   "--num-requests", "16", "--concurrency", "16", "--input-len", "128", "--output-len", str(output_len),
                   "--vocab-size", str(vocab_size), "--output", str(output)]  # fmt: skip
        load = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while load.poll() is None:
                work()
        finally:
            load.kill()
            load.wait()
        if load.returncode != 0:
            raise RuntimeError("requests of the load have failed: see above")
        times[name] = json.loads(output.read_text())["values"]["ITL"]["p99"]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure")
    parser.add_argument("--work-dir", type=Path, default=RESULTS, help="where the random model is, or is made")
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for the server")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown parts {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    folder = make_model(args.work_dir / "model-8b", SHAPE)
    limits = Limits.measure()
    empty_gpu()
    rows: Rows = [
        ("limits", f"copy {limits.copy / 1e9:.0f} GB/s, product {limits.product / 1e12:.0f} TFLOP/s, "
                   f"peer copy {limits.peer_copy / 1e9:.0f} GB/s"),
    ]  # fmt: skip
    values: dict[str, Any] = {"limits": dataclasses.asdict(limits)}
    if {"decode", "throughput", "clone"} & set(parts):
        offer = ["--remote-instance-weight-loader-start-seed-via-transfer-engine"] if "clone" in parts else []
        server = Server(folder, *SERVER_FLAGS, *offer, *args.server_flags)
        try:
            rows.append(("start", f"{server.ready_s:.2f} s; phases {server.rank_info()['phases']}"))
            if "decode" in parts:
                measure_decode(server, limits, SHAPE, rows, values)
            if "throughput" in parts:
                measure_throughput(server, limits, SHAPE, rows, values)
            if "clone" in parts:
                measure_clone(server, folder, limits, SHAPE, rows, values)
        finally:
            server.stop()
            report("gpu", args.output, rows, values)  # also what was measured before an error
    else:
        report("gpu", args.output, rows, values)


if __name__ == "__main__":
    main()
