"""Launch to /health of a seed and of its client, beside a bare `import torch`, and where the time goes.

    python benchmark/bench_startup.py [--rounds 5] [--model-path FOLDER] [-- more flags for the client]

Every round starts all three, one after the other, on an otherwise idle machine. The client takes its weights from a
seed that keeps running. "beyond the transfer" is the client's launch-to-health less the seconds of its load.
"""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench_common import bench_model, make_parser, read_weights, report, running


def time_import_torch() -> float:
    """Seconds that a bare `python -c "import torch"` takes."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.monotonic() - start


def measure_round(model: Path, client_flags: list[str]) -> dict[str, dict]:
    """One start of each."""
    imports = {"import_torch_s": time_import_torch()}
    read_weights(model)
    with running(model, "--remote-instance-weight-loader-start-seed-via-transfer-engine") as seed:
        flags = ["--load-format", "remote_instance", "--remote-instance-weight-loader-seed-instance-ip", "127.0.0.1"]
        flags += ["--remote-instance-weight-loader-seed-instance-service-port", str(seed.port)]
        flags += ["--remote-instance-weight-loader-fallback", "error", *client_flags]
        with running(model, *flags) as client:
            return {
                "import": imports,
                "seed": {"ready_s": seed.ready_s, **seed.rank_info()},
                "client": {"ready_s": client.ready_s, **client.rank_info()},
            }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = bench_model(args.model_path)
    rounds = [measure_round(model, args.server_flags) for _ in range(args.rounds)]

    import_s = median([r["import"]["import_torch_s"] for r in rounds])
    rows = [("import torch", f"{import_s:.2f} s")]
    values: dict = {"import_torch_s": import_s, "rounds": rounds}
    for name in ("seed", "client"):
        ready_s = median([r[name]["ready_s"] for r in rounds])
        load = rounds[-1][name]["load_report"]
        load_s = median([r[name]["load_report"]["seconds"] for r in rounds])
        ratio = median([(r[name]["ready_s"] - r[name]["load_report"]["seconds"]) / import_s for r in rounds])
        rows.append((f"{name}: launch to /health", f"{ready_s:.2f} s"))
        rows.append((f"{name}: load", f"{load_s:.3f} s, {load['num_bytes'] / 1e6:.0f} MB, {load['source']}"))
        rows.append((f"{name}: beyond the transfer", f"{ratio:.2f} x import torch"))
        for phase in rounds[-1][name]["phases"]:
            phase_s = median([r[name]["phases"][phase] for r in rounds])
            rows.append((f"{name}: {phase}", f"{phase_s:.2f} s after launch"))
        values[name] = {"ready_s": ready_s, "load_s": load_s, "ratio_beyond_transfer": ratio}
    report("start-up", args.output, rows, values)


if __name__ == "__main__":
    main()
