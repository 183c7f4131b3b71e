"""Kills a node or a rank of a two-node instance at each phase of its start, and checks that everything ends.

    python test/manual/kill_while_starting.py [--topology tp2|pp2|dp2]

Needs root, for network namespaces, or else uses addresses 127.0.0.x. Every case must end on both nodes within 30 s
of the kill (a node that has not come yet: within --dist-timeout, 20 s here), with a line that names the lost node
where it had come, and leave no process behind. Prints a line for each case; exit code 1 if one fails.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "python")]

import random_models as rm  # noqa: E402 - its folder is made importable above
from cluster import Case, Cluster, Network, Node  # noqa: E402 - its folder is made importable above
from server_process import is_running, wait_until  # noqa: E402 - its folder is made importable above

TOPOLOGIES = {"tp2": Case(nnodes=2, tp_size=2), "pp2": Case(nnodes=2, pp_size=2), "dp2": Case(nnodes=2, dp_size=2)}
PHASES = ("starting; users", "KV cache", "loaded target", "offering", "ready on")  # a line of the log of some node
VICTIMS = ("node 0", "node 1", "rank 0", "rank 1")
FLAGS = ("--remote-instance-weight-loader-start-seed-via-transfer-engine", "--dist-timeout", "20")
LOSS_TIMEOUT_S = 30
START_TIMEOUT_S = 120


def wait_for_phase(cluster: Cluster, phase: str) -> None:
    wait_until(lambda: any(phase in node.output for node in cluster.nodes), f"a line with {phase!r}", START_TIMEOUT_S)


def find_rank(node: Node) -> int | None:
    """The process of a node's rank, if it has one."""
    for pid in node.descendants():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            if b"scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def kill(node: Node, victim: str) -> None:
    if victim.startswith("node"):
        node.kill()
    else:  # a launcher starts its ranks a moment after it listens
        os.kill(wait_until(lambda: find_rank(node), f"the process of {victim}", START_TIMEOUT_S), signal.SIGKILL)


def run(case: Case, phase: str, victim: str, model: Path, folder: Path) -> str:
    """What is wrong; empty if all is well."""
    lost = int(victim.split()[1])
    with Network(2) as network, Cluster(case, network.hosts, model, folder, *FLAGS) as cluster:
        wait_for_phase(cluster, phase)
        everyone = [pid for node in cluster.nodes for pid in [*node.descendants(), node.process.pid]]
        kill(cluster.nodes[lost], victim)
        start = time.monotonic()
        try:
            for node in cluster.nodes:
                node.process.wait(max(0.1, start + LOSS_TIMEOUT_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            return f"not all nodes have ended {LOSS_TIMEOUT_S} s later"
        print(f"    all ended after {time.monotonic() - start:.1f} s", flush=True)
        if f"node {lost}" not in cluster.nodes[1 - lost].output:
            return f"the other node's log does not name node {lost}"
        time.sleep(1)  # for processes that the kernel is ending
        left = [pid for pid in everyone if is_running(pid)]
        return f"processes {left} are left" if left else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=TOPOLOGIES, default="tp2")
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="ramet-kills-") as temporary:
        model = rm.make_model(Path(temporary), "qwen3_moe", num_hidden_layers=4)
        for phase in PHASES:
            for victim in VICTIMS:
                folder = Path(temporary) / f"{phase} {victim}".replace(" ", "-")
                folder.mkdir()
                print(f"{args.topology}: {victim} killed at '{phase}'", flush=True)
                if fault := run(TOPOLOGIES[args.topology], phase, victim, model, folder):
                    faults += 1
                    print(f"    FAULT: {fault}", flush=True)
    print("all cases ended as they should" if not faults else f"{faults} cases did not")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
