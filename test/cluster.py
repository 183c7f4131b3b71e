"""Starts one instance over several nodes for tests: network namespaces with addresses of their own, or 127.0.0.x."""

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

PYTHON_FOLDER = Path(__file__).resolve().parent.parent / "python"
CLONE_NEWNET = 0x40000000  # linux/sched.h
READY_TIMEOUT_S = 150.0
ALL_TOPOLOGIES = os.environ.get("RAMET_TOPOLOGIES") == "all"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """One topology of an instance."""

    nnodes: int = 1
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    dp_attention: bool = False

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * (1 if self.dp_attention else self.dp_size)

    def flags(self) -> list[str]:
        sizes = {"--tp-size": self.tp_size, "--pp-size": self.pp_size, "--dp-size": self.dp_size}
        sizes |= {"--ep-size": self.ep_size, "--nnodes": self.nnodes}
        words = [word for name, size in sizes.items() for word in (name, str(size))]
        return [*words, "--enable-dp-attention"] if self.dp_attention else words


def usual_or_all(usual: Iterable[str], others: Iterable[str]) -> list[str]:
    """What a test runs: `others`, whose parts are in the usual ones too, where RAMET_TOPOLOGIES=all asks for them."""
    return [*usual, *(others if ALL_TOPOLOGIES else ())]


CASES = {
    "tp4_nodes2": Case(nnodes=2, tp_size=4),
    "dp2_single_node": Case(dp_size=2),
    "dp2_tp2_nodes2": Case(nnodes=2, dp_size=2, tp_size=2),
    "pp2_tp2_nodes2": Case(nnodes=2, pp_size=2, tp_size=2),
}


@dataclass(frozen=True)
class Host:
    """Where one node runs."""

    address: str
    namespace: str | None = None

    @property
    def prefix(self) -> list[str]:
        """What comes before a command to run it there."""
        return [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]

    def inside(self, function: Callable[[], Result]) -> Result:
        """Call `function` with the host's view of the network: in a thread that enters its namespace."""
        if self.namespace is None:
            return function()

        def run() -> Result:
            with open(f"/run/netns/{self.namespace}") as handle:
                if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns failed")
            return function()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(run).result()


def namespaces_work() -> bool:
    """Whether this user may make network namespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"ramet-{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode != 0:
        return False
    subprocess.run(["ip", "netns", "del", name], check=True, capture_output=True)
    return True


class Network:
    """Hosts that reach each other. With namespaces each has its own interfaces; else they share loopback."""

    def __init__(self, count: int):
        self._names: list[str] = []
        if not namespaces_work():
            self.hosts = [Host(f"127.0.0.{number + 1}") for number in range(count)]
            return
        tag = uuid.uuid4().hex[:6]
        switch = f"ramet-{tag}-s"
        self._add_namespace(switch)
        self._run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        self._run("ip", "-n", switch, "link", "set", "br0", "up")
        self.hosts = []
        for number in range(count):
            name, address = f"ramet-{tag}-{number}", f"10.77.0.{number + 1}"
            self._add_namespace(name)
            self._run(
                "ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", switch
            )
            self._run("ip", "-n", switch, "link", "set", f"p{number}", "master", "br0", "up")
            self._run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            self._run("ip", "-n", name, "link", "set", "eth0", "up")
            self._run("ip", "-n", name, "link", "set", "lo", "up")
            self.hosts.append(Host(address, name))

    def _add_namespace(self, name: str) -> None:
        # Files below /etc/netns/NAME take the place of those in /etc: without a name server that nobody can reach.
        folder = Path("/etc/netns") / name
        folder.mkdir(parents=True)
        (folder / "resolv.conf").write_text("")
        self._names.append(name)
        self._run("ip", "netns", "add", name)

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Node:
    """One node's launcher."""

    def __init__(self, host: Host, port: int, log: Path, flags: list[str]):
        self.host = host
        self.port = port
        self.log = log
        command = [*host.prefix, sys.executable, "-m", "ramet.launch_server", "--host", host.address]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), *flags],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(PYTHON_FOLDER), "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def request(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 60) -> tuple[int, Any]:
        """Status and JSON of a GET, or of a POST with a body; status 0 if nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        url = f"http://{self.host.address}:{self.port}{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})

        def ask() -> tuple[int, Any]:
            try:
                with urllib.request.urlopen(request, timeout=timeout_s) as response:
                    return response.status, json.load(response)
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read() or b"null")
            except OSError:
                return 0, None

        return self.host.inside(ask)

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while self.request("/health")[0] != 200:
            if self.process.poll() is not None:
                raise RuntimeError(f"the node ended with {self.process.returncode}:\n{self.output}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the node was not ready after {timeout_s:g} s:\n{self.output}")
            time.sleep(0.1)

    def generate(self, input_ids: list[int], num_tokens: int) -> list[int]:
        """The greedy continuation."""
        params = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        status, answer = self.request("/generate", {"input_ids": input_ids, "sampling_params": params})
        assert status == 200, answer
        return answer["output_ids"]

    def descendants(self) -> list[int]:
        """Process ids of everything that this node has started."""
        children: dict[int, list[int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except (OSError, IndexError):
                    continue
                children.setdefault(parent, []).append(int(folder.name))
        found = list(children.get(self.process.pid, []))
        for pid in found:  # the list grows while it is walked
            found.extend(children.get(pid, []))
        return found

    def kill(self) -> None:
        """SIGKILL for the launcher and all of its children at once: the machine is lost."""
        for pid in [*self.descendants(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


class Cluster:
    """One instance over the nodes of a case."""

    def __init__(self, case: Case, hosts: list[Host], model: Path, folder: Path, *flags: str):
        self.case = case
        meeting_point = f"{hosts[0].address}:{_free_port(hosts[0])}"
        common = ["--model-path", str(model), *case.flags(), *flags]
        if case.nnodes > 1:
            common += ["--dist-init-addr", meeting_point]
        bootstrap = ["--engine-info-bootstrap-port", str(_free_port(hosts[0]))]
        self.nodes: list[Node] = []
        for rank in range(case.nnodes):
            log = folder / f"node{rank}.log"
            self.start_node(hosts[rank], log, [*common, *bootstrap, "--node-rank", str(rank)])

    def start_node(self, host: Host, log: Path, flags: list[str]) -> None:
        self.nodes.append(Node(host, _free_port(host), log, flags))

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def wait_ready(self) -> "Cluster":
        for node in self.nodes:
            node.wait_ready()
        return self

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _free_port(host: Host) -> int:
    def probe() -> int:
        with socket.socket() as one:
            one.bind((host.address, 0))
            return one.getsockname()[1]

    return host.inside(probe)


def check_registrations(head: Node, case: Case) -> None:
    """Every rank of every node, stage and replica can be found on the head, each under its own number."""
    sessions = set()
    for rank in range(case.world_size):
        status, answer = head.request(f"/remote_instance_transfer_engine_info?rank={rank}")
        assert status == 200, f"rank {rank}: {status} {answer}"
        session, weights = answer["remote_instance_transfer_engine_info"]
        assert answer["rank"] == rank and weights
        parallel = answer["manifest"]["parallel"]
        place = (parallel["dp_rank"] * case.pp_size + parallel["pp_rank"]) * case.tp_size + parallel["tp_rank"]
        assert place == rank, f"rank {rank} is described as {parallel}"
        sessions.add(session)
    assert len(sessions) == case.world_size, "two ranks have registered the same memory"
    assert head.request(f"/remote_instance_transfer_engine_info?rank={case.world_size}")[0] == 404
