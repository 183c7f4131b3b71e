"""How soon every rank of an instance can be found: from the last rank's weights to the last registration.

    python benchmark/bench_registration.py [--ranks 8] [--rounds 3]

Every round starts an instance of that many tensor-parallel ranks on this machine, with a small random model: what is
measured is checksums, sealing, the transfer engine and the bootstrap server, not the weights.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench_common import ROOT, Server, report

sys.path.insert(0, str(ROOT / "test"))


def make_model(folder: Path, ranks: int) -> Path:
    """A random model whose heads and sizes can be split over the ranks."""
    from random_models import write_tokenizer
    from seed_server import write_random_model

    sizes = {"num_attention_heads": 8 * ranks, "num_key_value_heads": ranks, "head_dim": 16, "hidden_size": 256}
    write_random_model(folder, "llama3", **sizes, intermediate_size=64 * ranks, num_hidden_layers=4)
    write_tokenizer(folder)
    return folder


def measure_round(model: Path, ranks: int) -> dict[str, float]:
    """Seconds after the launch at which the last rank had its weights, and had registered."""
    server = Server(
        model,
        "--tp-size",
        str(ranks),
        "--max-total-tokens",
        "512",
        "--remote-instance-weight-loader-start-seed-via-transfer-engine",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        phases = [rank["phases"] for rank in server.call("/get_server_info")["ranks"]]
    finally:
        server.stop()
    own = [one["registered"] - one["weights"] for one in phases]
    return {
        "weights_s": max(one["weights"] for one in phases),
        "registered_s": max(one["registered"] for one in phases),
        "slowest_own_s": max(own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ramet-bench-") as folder:
        model = make_model(Path(folder), args.ranks)
        rounds = [measure_round(model, args.ranks) for _ in range(args.rounds)]
    delays = [one["registered_s"] - one["weights_s"] for one in rounds]
    own = [one["slowest_own_s"] for one in rounds]
    rows = [
        (f"last of {args.ranks} ranks has its weights to all of them registered", f"{median(delays):.3f} s"),
        ("slowest rank, from its own weights on", f"{median(own):.3f} s"),
    ]
    report("Registration", args.output, rows, {"ranks": args.ranks, "rounds": rounds})


if __name__ == "__main__":
    main()
