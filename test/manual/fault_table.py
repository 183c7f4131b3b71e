"""Kills and stops each process of real instances in each phase, and writes what comes of it as tables for the docs.

    python test/manual/fault_table.py [--scenes one-node,helpers,two-nodes,…] [--timeout 8] [--output FILE]

A case starts an instance (on the CPU), brings it into a phase, sends SIGKILL or SIGSTOP to one process, and watches:
when /health stops saying 200, when the launcher has ended and with which code, what a caller gets, and which processes,
temporary files and shared memory are left. The processes are found, not listed here. "sockets" lists what an instance
listens on with --host 127.0.0.1. Two nodes are network namespaces, which need root, or else addresses 127.0.0.x.
Exit code 1 if a case ends too late, leaves something, leaves a caller waiting, or shows a traceback.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "test"), str(ROOT / "python"), str(Path(__file__).resolve().parent)]

from cluster import Case, Cluster, Network, Node  # noqa: E402 - its folder is made importable above
from fault_scene import (  # noqa: E402 - its folder is made importable above
    HELPERS,
    Caller,
    ask_at_length,
    ask_for_constraint,
    ask_in_chat,
    descendants,
    directly,
    free_port,
    health,
    metadata_server,
    processes_of,
)
from listening_sockets import classify, known_kinds, listeners_of  # noqa: E402 - its folder is made importable above
from server_process import ServerProcess, is_running, wait_until  # noqa: E402 - its folder is made importable above

DEMO_MODEL = ROOT / "examples" / "demo_model"
OFFER = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
PREFIX = "--remote-instance-weight-loader"
ACTIONS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
PHASES = ("starting", "idle", "serving", "draining")
SCENES = ("one-node", "helpers", "two-nodes", "metadata", "seed", "sockets")
START_TIMEOUT_S = 120.0
HELPER_TIMEOUT_S = 75.0  # until one that is stopped has been replaced
SLACK_S = 6.0  # beyond --watchdog-timeout, on a machine that does something else besides
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Outcome:
    """One row of the table."""

    where: str
    phase: str
    victim: str
    action: str
    unhealthy_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    callers: str = "—"
    line: str = ""
    left: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        def seconds(value: float | None) -> str:
            return "—" if value is None else f"{value:.1f}"

        cells = [
            self.where, self.phase, self.victim, self.action, seconds(self.unhealthy_s), seconds(self.ended_s),
            "—" if self.exit_code is None else str(self.exit_code), self.callers, ", ".join(self.left) or "nothing",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


HEADER = (
    "| instance | phase | process | is | /health not 200 after s | ended after s | exit code | callers get | left |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class Bench:
    """Runs cases and collects their outcomes."""

    def __init__(self, timeout_s: float, folder: Path):
        self.timeout_s = timeout_s
        self.folder = folder
        self.outcomes: list[Outcome] = []
        self._count = 0

    def new_folder(self) -> Path:
        self._count += 1
        folder = self.folder / f"{self._count}"
        folder.mkdir()
        return folder

    def done(self, outcome: Outcome, output: str) -> None:
        if "Traceback" in output:
            outcome.faults.append("a traceback")
        if "for ever" in outcome.callers:
            outcome.faults.append("a caller waits for ever")
        if outcome.left:
            outcome.faults.append(f"left: {outcome.left}")
        self.outcomes.append(outcome)
        print(outcome.row(), flush=True)
        if outcome.line:
            print(f"    {outcome.line}", flush=True)
        for fault in outcome.faults:
            print(f"    FAULT: {fault}", flush=True)
        if "a traceback" in outcome.faults:
            print(output[-3000:])

    def one_node(self, phases: list[str], actions: list[str], victims: str) -> None:
        """Every process of an instance with two ranks."""
        names = self._names()
        for phase in phases:
            for victim in names:
                for action in actions:
                    if re.fullmatch(victims, victim):
                        self._one_case(phase, victim, action)

    def _start(self) -> ServerProcess:
        flags = ["--tp-size", "2", "--device", "cpu", "--watchdog-timeout", f"{self.timeout_s:g}", OFFER]
        flags += ["--engine-info-bootstrap-port", "0", "--drain-timeout", "60"]
        return ServerProcess(DEMO_MODEL, self.new_folder() / "log", *flags, fake=False)

    def _names(self) -> list[str]:
        with self._start() as server:
            server.wait_ready()
            # A transport process ("engine") is started again: test/integration/test_transport_process.py.
            return [name for name in processes_of(server.process.pid) if not name.startswith("engine")]

    def _one_case(self, phase: str, victim: str, action: str) -> None:
        before = set(os.listdir(SHARED_MEMORY))
        with self._start() as server:
            url = server.url
            if phase != "starting":
                server.wait_ready()
            find = lambda: processes_of(server.process.pid).get(victim)  # noqa: E731 - asked until it is there
            pid = wait_until(find, f"the process {victim}", START_TIMEOUT_S)
            caller = None
            if phase in ("serving", "draining"):
                caller = Caller(url, directly)
                assert caller.begun.wait(30), "no token has come"
            if phase == "draining":
                server.signal()
                wait_until(lambda: "SIGTERM" in server.output, "the drain")
            if phase == "starting":
                time.sleep(0.5)
            everyone = descendants(server.process.pid)
            os.kill(pid, ACTIONS[action])
            outcome = Outcome("tp 2", phase, victim, action)
            if phase == "idle":
                caller = Caller(url, directly)
            self._follow(outcome, server, url, caller, everyone, before)

    def _follow(
        self,
        outcome: Outcome,
        server: ServerProcess,
        url: str,
        caller: Caller | None,
        everyone: list[int],
        shared_before: set[str],
    ) -> None:
        start = time.monotonic()
        limit_s = self.timeout_s + SLACK_S
        is_watched = outcome.phase in ("idle", "serving")
        while server.process.poll() is None and time.monotonic() < start + limit_s:
            if outcome.unhealthy_s is None and is_watched and health(url) != 200:
                outcome.unhealthy_s = time.monotonic() - start
            time.sleep(0.1)
        outcome.exit_code = server.process.poll()
        outcome.ended_s = time.monotonic() - start if outcome.exit_code is not None else None
        if outcome.exit_code is None:
            outcome.faults.append(f"has not ended within {limit_s:g} s")
        elif outcome.exit_code == 0:
            outcome.faults.append("ended with exit code 0")
        if caller is not None:
            outcome.callers = caller.outcome(5)
        lines = [line for line in server.output.splitlines() if "error:" in line or "CRITICAL" in line]
        outcome.line = lines[0] if lines else ""
        if not lines and not (outcome.victim == "main" and outcome.action == "killed"):
            outcome.faults.append("no line says why")
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(map(is_running, everyone)) and not server.leftovers(), "the end", 5)
        outcome.left = [f"process {pid}" for pid in everyone if is_running(pid)] + server.leftovers()
        outcome.left += [f"/dev/shm/{name}" for name in set(os.listdir(SHARED_MEMORY)) - shared_before]
        for pid in everyone:
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        self.done(outcome, server.output)

    def helpers(self, actions: list[str], victims: str) -> None:
        """Every process that an instance starts for one kind of work: the instance goes on, and replaces it."""
        for victim in HELPERS:
            for action in actions:
                if re.fullmatch(victims, victim):
                    self._helper_case(victim, action)

    def _helper_case(self, victim: str, action: str) -> None:
        flags = ["--device", "cpu", "--watchdog-timeout", f"{self.timeout_s:g}", OFFER, "--served-model-name", "faulty"]
        flags += ["--engine-info-bootstrap-port", "0"]
        with ServerProcess(DEMO_MODEL, self.new_folder() / "log", *flags, fake=False) as server:
            url = server.wait_ready().url
            find = lambda: processes_of(server.process.pid)  # noqa: E731 - asked until it is there
            assert [ask(url) for ask in (ask_for_constraint, ask_in_chat, ask_at_length)] == [200, 200, 200]
            pid = wait_until(lambda: find().get(victim), f"the process {victim}")
            outcome = Outcome("tp 1", "serving", victim, action)
            caller = Caller(url, directly)
            assert caller.begun.wait(30), "no token has come"
            os.kill(pid, ACTIONS[action])
            start = time.monotonic()
            needs = HELPERS[victim]
            told = []
            while (pid in find().values() or needs is not None and told[-1:] != [200]) and (
                time.monotonic() < start + HELPER_TIMEOUT_S
            ):
                if health(url) != 200:
                    outcome.unhealthy_s = time.monotonic() - start
                    outcome.faults.append("the instance is not healthy meanwhile")
                if needs is not None:
                    told.append(needs(url))
                time.sleep(0.2)
            seconds = time.monotonic() - start
            if pid in find().values():
                outcome.faults.append(f"it has not been replaced within {HELPER_TIMEOUT_S:g} s")
            words = [caller.outcome(60), f"replaced after {seconds:.1f} s"]
            if told:
                words.insert(1, "who needs it: " + ", ".join(map(str, told)))
            outcome.callers = "; ".join(words)
            self._goes_on(outcome, server, url)

    def two_nodes(self, phases: list[str], actions: list[str], victims: str) -> None:
        """Every process of the second node, while callers ask the first."""
        for phase in phases:
            for victim in ("main", "scheduler 0"):
                for action in actions:
                    if phase in ("idle", "serving") and re.fullmatch(victims, victim):
                        self._two_node_case(phase, victim, action)

    def _two_node_case(self, phase: str, victim: str, action: str) -> None:
        flags = ("--device", "cpu", "--watchdog-timeout", f"{self.timeout_s:g}", "--dist-timeout", "30")
        with (
            Network(2) as network,
            Cluster(Case(nnodes=2, tp_size=2), network.hosts, DEMO_MODEL, self.new_folder(), *flags) as cluster,
        ):
            cluster.wait_ready()
            head, other = cluster.nodes
            url = f"http://{head.host.address}:{head.port}"
            caller = Caller(url, head.host.inside)
            if phase == "serving":
                assert caller.begun.wait(30), "no token has come"
            else:
                caller.outcome(60)
            everyone = [pid for node in cluster.nodes for pid in descendants(node.process.pid)]
            os.kill(processes_of(other.process.pid)[victim], ACTIONS[action])
            if phase == "idle":
                caller = Caller(url, head.host.inside)
            outcome = Outcome("tp 2, 2 nodes", phase, f"{victim} of node 1", action)
            start = time.monotonic()
            limit_s = self.timeout_s + 10 + SLACK_S
            while self._some_run(cluster.nodes) and time.monotonic() < start + limit_s:
                if outcome.unhealthy_s is None and head.request("/health", timeout_s=1)[0] != 200:
                    outcome.unhealthy_s = time.monotonic() - start
                time.sleep(0.1)
            outcome.exit_code = head.process.poll()
            if self._some_run(cluster.nodes):
                outcome.faults.append(f"not all nodes have ended within {limit_s:g} s")
            else:
                outcome.ended_s = time.monotonic() - start
            outcome.callers = caller.outcome(5)
            lines = [line for line in head.output.splitlines() if "error:" in line]
            outcome.line = lines[0] if lines else ""
            if "node 1" not in head.output:
                outcome.faults.append("node 0 does not name node 1")
            time.sleep(1)
            outcome.left = [f"process {pid}" for pid in everyone if is_running(pid)]
            for pid in everyone:
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
            self.done(outcome, head.output + other.output)

    @staticmethod
    def _some_run(nodes: list[Node]) -> bool:
        return any(node.process.poll() is None for node in nodes)

    def metadata(self, actions: list[str]) -> None:
        """The metadata server that a serving instance is published to: the instance goes on."""
        for action in actions:
            folder = self.new_folder()
            with metadata_server(folder) as (launcher, port):
                config = json.dumps({"url": f"127.0.0.1:{port}", "source": True})
                flags = ["--device", "cpu", "--modelexpress-config", config, "--engine-info-bootstrap-port", "0"]
                with ServerProcess(DEMO_MODEL, folder / "log", *flags, fake=False) as server:
                    url = server.wait_ready().url
                    os.kill(launcher, ACTIONS[action])
                    self._goes_on(Outcome("tp 1", "serving", "metadata server", action), server, url)

    def seed(self, actions: list[str]) -> None:
        """The seed of an instance that is about to start: that takes what is missing from the files."""
        flags = ["--device", "cpu", "--engine-info-bootstrap-port", "0"]
        for action in actions:
            for victim in ("main", "scheduler 0"):
                folder = self.new_folder()
                with ServerProcess(DEMO_MODEL, folder / "seed", *flags, OFFER, fake=False) as seed:
                    address = seed.wait_ready().url.removeprefix("http://")
                    everyone = descendants(seed.process.pid)
                    more = ["--load-format", "remote_instance", f"{PREFIX}-seed-instance-ip", address]
                    more += [f"{PREFIX}-timeout", "10"]
                    with ServerProcess(DEMO_MODEL, folder / "log", *flags, *more, fake=False) as client:
                        url = client.url
                        os.kill(processes_of(seed.process.pid)[victim], ACTIONS[action])
                        client.wait_ready()
                        self._goes_on(Outcome("a clone", "starting", f"its seed's {victim}", action), client, url)
                    for pid in everyone:
                        if is_running(pid):
                            os.kill(pid, signal.SIGKILL)

    def _goes_on(self, outcome: Outcome, server: ServerProcess, url: str) -> None:
        answer = Caller(url, directly).outcome(60)
        outcome.callers = answer if outcome.callers == "—" else outcome.callers
        if answer != "their answer" or health(url) != 200:
            outcome.faults.append("the instance does not go on")
        server.signal()
        outcome.exit_code = server.wait_exit(40)
        if outcome.exit_code != 0:
            outcome.faults.append(f"a SIGTERM afterwards ends it with {outcome.exit_code}")
        outcome.left = server.leftovers()
        self.done(outcome, server.output)

    def sockets(self) -> list[str]:
        """Rows about what an instance listens on. Raises ValueError for a socket of no known kind."""
        folder = self.new_folder()
        bootstrap = free_port()
        config = json.dumps({"url": "embedded:0", "source": True})
        flags = ["--tp-size", "2", "--device", "cpu", OFFER, "--engine-info-bootstrap-port", str(bootstrap)]
        flags += ["--host", "127.0.0.1", "--modelexpress-config", config]
        with ServerProcess(DEMO_MODEL, folder / "log", *flags, fake=False) as server:
            url = server.wait_ready().url
            names = processes_of(server.process.pid)
            ports = {"http": int(url.rpartition(":")[2]), "bootstrap": bootstrap}
            return describe_sockets(names, ports)


def describe_sockets(names: dict[str, int], ports: dict[str, int]) -> list[str]:
    """A row for each kind of socket in each process, with the addresses as they are bound."""
    kinds = known_kinds(ports)
    by_pid = {pid: name for name, pid in names.items()}
    rows: dict[tuple[str, str], tuple[set[str], str]] = {}
    for listener in listeners_of(list(by_pid)):
        process = by_pid[listener.pid]
        kind = classify(listener, process, kinds)
        where = re.sub(r"\d+$", "*", listener.address) if listener.kind == "tcp" else listener.address
        where = re.sub(r".*/ramet\.\w+", "TMPDIR/ramet.*", where)
        where = re.sub(r"-([0-9a-f]{32})$", "-*", where)
        key = kind.name, re.sub(r"\d+$", "N", process)
        rows.setdefault(key, (set(), f"{kind.who} | {kind.takes}"))[0].add(re.sub(r"-\d+$", "-N", where))
    return [
        f"| {name} | {process} | {', '.join(f'`{one}`' for one in sorted(where))} | {words} |"
        for (name, process), (where, words) in rows.items()
    ]


SOCKET_HEADER = "| socket | process | bound to | who may talk | what it takes |\n|---|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", default=",".join(SCENES), help="which, with commas between")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--victims", default=".*", help="regular expression for the processes' names")
    parser.add_argument("--timeout", type=float, default=8.0, help="--watchdog-timeout of the instances")
    parser.add_argument("--output", type=Path, help="file for the tables")
    args = parser.parse_args()
    scenes, phases, actions = (text.split(",") for text in (args.scenes, args.phases, args.actions))
    parts = []
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        bench = Bench(args.timeout, Path(temporary))
        if "one-node" in scenes:
            bench.one_node(phases, actions, args.victims)
        if "helpers" in scenes:
            bench.helpers(actions, args.victims)
        if "two-nodes" in scenes:
            bench.two_nodes(phases, actions, args.victims)
        if "metadata" in scenes:
            bench.metadata(actions)
        if "seed" in scenes:
            bench.seed(actions)
        if bench.outcomes:
            parts.append("\n".join([HEADER, *(outcome.row() for outcome in bench.outcomes)]))
        if "sockets" in scenes:
            parts.append("\n".join([SOCKET_HEADER, *bench.sockets()]))
            print(parts[-1])
    if args.output is not None:
        args.output.write_text("\n\n".join(parts) + "\n")
    faults = sum(bool(outcome.faults) for outcome in bench.outcomes)
    print(f"{len(bench.outcomes)} cases, {faults} not as they should be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
