"""Owns a run of SGLang's serving benchmark against a server, and what it wrote."""

import json
from pathlib import Path
from typing import Any

from clients.client_run import kept_file, run_program
from clients.environments import DRIVERS, python_of
from clients.wire_tap import WireTap
from server_process import MODEL_NAME

NUM_PROMPTS = 8
OUTPUT_LEN = 12


def run_sglang_bench(url: str, model: Path, backend: str, name: str, *flags: str) -> dict[str, Any]:
    """Its record of a run of NUM_PROMPTS random prompts with OUTPUT_LEN tokens each; `flags` are further ones."""
    record = kept_file(f"sglang_bench_{name}.json")
    record.unlink(missing_ok=True)
    tap = WireTap(url, kept_file(f"sglang_bench_{name}.wire.jsonl"))
    python = python_of("sglang")
    command = [
        python, DRIVERS / "sglang_bench.py", "--backend", backend, "--base-url", tap.url,
        "--model", MODEL_NAME, "--tokenizer", model, "--dataset-name", "random-ids", "--num-prompts", NUM_PROMPTS,
        "--random-input-len", "40", "--random-output-len", OUTPUT_LEN, "--random-range-ratio", "1",
        "--output-file", record, "--output-details", "--disable-tqdm", "--warmup-requests", "1", *flags,
    ]  # fmt: skip
    try:
        result = run_program(command, f"sglang_bench_{name}", 240)
    finally:
        tap.close()
    assert record.exists(), f"the benchmark has written nothing:\n{(result.stdout + result.stderr)[-2000:]}"
    return json.loads(record.read_text().splitlines()[-1])
