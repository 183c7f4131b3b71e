"""Runs one topology over real machines or terminals and asks the head for every rank.

In two terminals (one for a case of one node), then in a third:

    python test/manual/test_cross_node_scheduler_info_sync.py --test-case tp4_nodes2 --node-rank 0
    python test/manual/test_cross_node_scheduler_info_sync.py --test-case tp4_nodes2 --node-rank 1
    python test/manual/test_cross_node_scheduler_info_sync.py --test-case tp4_nodes2 --test-only

Over machines, give each the address of node 0 with --head-host and its own with --host. CPU unless --device cuda.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "python")]

from cluster import CASES, Host, Node, check_registrations  # noqa: E402 - its folder is made importable above

NODE_PORTS = 30000  # node n serves on the n-th port from here, so that all nodes may be one machine
QUESTION = "What is a ramet?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test-case", choices=sorted(CASES), required=True)
    parser.add_argument("--node-rank", type=int, default=0, help="which node to run here")
    parser.add_argument("--test-only", action="store_true", help="ask the running instance instead")
    parser.add_argument("--head-host", default="127.0.0.1", help="address of node 0")
    parser.add_argument("--host", help="address of this node; that of node 0 when not given")
    parser.add_argument("--dist-port", type=int, default=5000, help="where the ranks meet, on node 0")
    parser.add_argument("--model-path", default=str(ROOT / "examples" / "demo_model"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    return check(args) if args.test_only else serve(args)


def serve(args: argparse.Namespace) -> NoReturn:
    """Become the server of one node."""
    case = CASES[args.test_case]
    if not 0 <= args.node_rank < case.nnodes:
        sys.exit(f"{args.test_case} has the nodes 0 to {case.nnodes - 1}")
    command = [sys.executable, "-m", "ramet.launch_server", "--model-path", args.model_path, *case.flags()]
    command += ["--node-rank", str(args.node_rank), "--host", args.host or args.head_host, "--device", args.device]
    command += ["--port", str(NODE_PORTS + args.node_rank)]
    command += ["--remote-instance-weight-loader-start-seed-via-transfer-engine"]
    if case.nnodes > 1:
        command += ["--dist-init-addr", f"{args.head_host}:{args.dist_port}"]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    os.execv(sys.executable, command)


class RunningNode(Node):
    """A node that somebody else has started."""

    def __init__(self, host: Host, port: int):
        self.host, self.port = host, port


def check(args: argparse.Namespace) -> int:
    """Ask the head for every rank and for an answer."""
    case = CASES[args.test_case]
    head = RunningNode(Host(args.head_host), NODE_PORTS)
    check_registrations(head, case)
    print(f"all {case.world_size} ranks of {args.test_case} are registered on {args.head_host}:{NODE_PORTS}")
    body = {"text": QUESTION, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    status, answer = head.request("/generate", body)
    print(f"{QUESTION} -> {status} {answer['text'] if status == 200 else answer!r}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
