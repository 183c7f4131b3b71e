"""Clones at once, each on a host of its own with a slow link: how long the last one takes against one alone.

    sudo python benchmark/bench_fan_out.py [--clones 1 2 4 8] [--rate-mbit 16] [--size-mib 32] [--alone]

The hosts are network namespaces, joined by a bridge in another one; tc limits what goes in and out of each. All of them
are this run's own, and are removed at its end. The weights are numbers of a toy model (test/seed_process.py), taken by
the project's own loader over Mooncake's TCP (test/fan_out_clones.py): no server starts, so that links are measured, and
not processors. `--alone` has nobody give anything on, as it was before. Needs root, iproute2 and the kernel's tbf.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "test"))

from fan_out_clones import CloneProcess  # noqa: E402
from seed_process import SeedProcess  # noqa: E402

NUM_TENSORS = 128
DEVICE = "eth0"  # of a host
NET = "10.99.0"
SWITCH_WAIT_MS = 100  # that a packet waits at most for its turn


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def inside(namespace: str) -> tuple[str, ...]:
    return "ip", "netns", "exec", namespace


def limit(namespace: str, device: str, rate_mbit: float) -> None:
    """What leaves a device; tc(8), tbf."""
    burst = f"{max(16, int(rate_mbit * 4))}kb"
    command = ["tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{rate_mbit}mbit", "burst", burst]
    subprocess.run([*inside(namespace), *command, "latency", f"{SWITCH_WAIT_MS}ms"], check=True)


class Hosts:
    """Namespaces that reach each other over links of one rate. Use as a context manager."""

    def __init__(self, count: int, rate_mbit: float) -> None:
        prefix = f"ramet-fan-{os.getpid()}"
        self.switch = f"{prefix}-switch"
        self.names = [f"{prefix}-{index}" for index in range(count)]
        self.addresses = [f"{NET}.{index + 1}" for index in range(count)]
        self._rate_mbit = rate_mbit
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Hosts":
        with self._stack:
            self._add(self.switch)
            ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
            ip("-n", self.switch, "link", "set", "switch", "up")
            for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
                self._add(name)
                self._join(index, name, address)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _add(self, name: str) -> None:
        ip("netns", "add", name)
        self._stack.callback(ip, "netns", "del", name)
        ip("-n", name, "link", "set", "lo", "up")

    def _join(self, index: int, name: str, address: str) -> None:
        port = f"port{index}"
        ip("-n", name, "link", "add", "name", DEVICE, "type", "veth", "peer", "name", port, "netns", self.switch)
        ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
        ip("-n", name, "link", "set", DEVICE, "up")
        ip("-n", name, "route", "add", "default", "dev", DEVICE)
        ip("-n", self.switch, "link", "set", port, "master", "switch", "up")
        limit(name, DEVICE, self._rate_mbit)
        limit(self.switch, port, self._rate_mbit)

    def sent_nbytes(self, index: int) -> int:
        """By a host, with all headers."""
        command = [*inside(self.names[index]), "ip", "-s", "-j", "link", "show", "dev", DEVICE]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[0]["stats64"]["tx"]["bytes"]


@contextlib.contextmanager
def run_clones(hosts: Hosts, count: int, model: dict[str, Any], *, gives: bool) -> Iterator[list[CloneProcess]]:
    """A seed on the first host, and clones on the next ones, which are ready to begin."""
    with contextlib.ExitStack() as stack:
        seed_config = model | {"host": hosts.addresses[0]}
        seed = stack.enter_context(SeedProcess(prefix=inside(hosts.names[0]), **seed_config))
        seeds = [(hosts.addresses[0], seed.port)]
        clones = [
            stack.enter_context(
                CloneProcess(model, seeds, *inside(name), host=address, waits=True, gives=gives, timeout_s=120.0)
            )
            for name, address in list(zip(hosts.names, hosts.addresses, strict=True))[1 : count + 1]
        ]
        for clone in clones:
            clone.read("prepared")
        yield clones


def measure(count: int, rate_mbit: float, size_mib: int, *, gives: bool) -> dict[str, float]:
    """Seconds until the last clone has checked everything, and copies that the seed has sent."""
    model = {"shapes": {f"t{index}": [size_mib * (1 << 18) // NUM_TENSORS] for index in range(NUM_TENSORS)}}
    nbytes = size_mib << 20
    with Hosts(count + 1, rate_mbit) as hosts, run_clones(hosts, count, model, gives=gives) as clones:
        sent = hosts.sent_nbytes(0)
        start = time.time()
        for clone in clones:
            clone.begin()
        done = [clone.read("done", "failed") for clone in clones]
        wrong = [one for one in done if one["what"] == "failed" or not one["is_right"]]
        if wrong:
            raise SystemExit(f"a clone failed: {wrong[0]}")
        seconds = [one["at"] - start for one in done]
        return {
            "clones": count,
            "first_s": min(seconds),
            "last_s": max(seconds),
            "copies": (hosts.sent_nbytes(0) - sent) / nbytes,
            "link_s": nbytes * 8 / 1e6 / rate_mbit,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clones", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rate-mbit", type=float, default=16.0, help="of each link, each way")
    parser.add_argument("--size-mib", type=int, default=32)
    parser.add_argument("--alone", action="store_true", help="nobody gives anything on")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was made is removed then, too
    if os.geteuid():
        raise SystemExit("namespaces and tc need root")
    print(f"{args.size_mib} MiB over {args.rate_mbit:g} Mbit/s; load of the machine {os.getloadavg()[0]:.1f}")
    one_s = 0.0
    for count in args.clones:
        row = measure(count, args.rate_mbit, args.size_mib, gives=not args.alone)
        one_s = one_s or row["last_s"]
        print(
            f"{count} clones: first {row['first_s']:.1f} s, last {row['last_s']:.1f} s = "
            f"{row['last_s'] / one_s:.2f} x the first row's, {row['last_s'] / row['link_s']:.2f} x the link's bound; "
            f"the seed sent {row['copies']:.2f} copies; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
