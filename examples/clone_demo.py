"""Shows the main job: an instance grows out of another one, and gives the same answers.

    python examples/clone_demo.py [--by-address] [--model-path FOLDER_OR_HUB_ID] [--once] [-- flags for both servers]

A metadata server is started, and then twice the same command: the first instance reads the files, the second finds the
first and takes its weights. With --by-address there is no metadata server: the client, which has no weight files, is
given the seed's address. Both keep serving until Ctrl-C. With --once the demo ends after the table: exit code 0 if the
second took its weights from the first and both gave the same answer, 1 otherwise. It owns the processes and nothing of
how they work.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "examples" / "demo_model"
SHOW_LAST_LINES = 15
STOP_TIMEOUT_S = 20.0
DRAIN_TIMEOUT_S = 5.0
MEM_FRACTION = 0.4  # of what each finds free: both are on one machine, or one GPU
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


class DemoError(Exception):
    """Something that ends the demo; its text is one or more lines for the user."""


class Instance:
    """One server process of the demo, its log file and the address of its HTTP port."""

    def __init__(
        self, name: str, port: int, log_path: Path, flags: list[str], module: str = "ramet.launch_server"
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        self.ready_s = 0.0  # from launch to the first good /health
        port_flag = "--port" if module == "ramet.launch_server" else "--metrics-port"
        command = [sys.executable, "-m", module, port_flag, str(port), *flags]
        self.launched = time.monotonic()
        with log_path.open("wb") as log:
            # A process group of its own: Ctrl-C reaches the demo alone, which then stops its servers in order.
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)

    def check_alive(self) -> None:
        """Raises DemoError with the end of the log when the process has ended."""
        code = self.process.poll()
        if code is not None:
            lines = self.log_path.read_text(errors="replace").splitlines()[-SHOW_LAST_LINES:]
            raise DemoError(
                "\n".join([f"the {self.name} has ended with exit code {code}; the end of its log:", *lines])
            )

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until /health answers 200."""
        while True:
            self.check_alive()
            with contextlib.suppress(OSError), urllib.request.urlopen(self.url + "/health", timeout=5):
                self.ready_s = time.monotonic() - self.launched
                return
            if time.monotonic() - self.launched > timeout_s:
                raise DemoError(f"the {self.name} was not ready after {timeout_s:g} s; its log is {self.log_path}")
            time.sleep(0.02)

    def call(self, path: str, body: dict | None = None, timeout_s: float = 120.0) -> Any:
        """The JSON answer of a GET, or of a POST when there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise DemoError(f"the {self.name} answered {path} with {error.code}: {error.read().decode()}") from error
        except OSError as error:
            self.check_alive()
            raise DemoError(f"the {self.name} did not answer {path}: {error}") from error

    def load_report(self) -> dict[str, Any]:
        """How the instance's weights were loaded, summed over its ranks."""
        reports = [rank["load_report"] for rank in self.call("/get_server_info")["ranks"]]
        return {
            "source": "+".join(sorted({report["source"] for report in reports})),
            "num_bytes": sum(report["num_bytes"] for report in reports),
            "seconds": max(report["seconds"] for report in reports),
        }

    def stop(self, deadline: float) -> None:
        """Wait for the end after a SIGTERM; kill what is still there at `deadline` (monotonic seconds)."""
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


def stop_all(instances: list[Instance]) -> bool:
    """End everything, what was started first last: the others tell it that they go.

    Returns:
        Whether all of them ended by themselves with exit code 0.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for group in (instances[:0:-1], instances[:1]):
        running = [instance for instance in group if instance.process.poll() is None]
        for instance in running:
            instance.process.terminate()
        for instance in running:
            instance.stop(deadline)
            if instance.process.returncode != 0:
                print(f"the {instance.name} ended with exit code {instance.process.returncode} after SIGTERM")
    return all(instance.process.returncode == 0 for instance in instances)


def find_model(path: str) -> Path:
    """The local folder of a model: `path` itself, or a snapshot of that Hugging Face hub id."""
    from ramet.srt.utils.hub import resolve_model_path

    if not Path(path).is_dir():
        print(f"looking for {path} on the Hugging Face hub", flush=True)
    try:
        return Path(resolve_model_path(path)).absolute()
    except ValueError as error:
        raise DemoError(str(error)) from error


def copy_without_weights(folder: Path, target: Path) -> None:
    """Copy the config and the tokenizer of a model: every file that holds no weights."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    in_config = config.is_file() and "chat_template" in json.loads(config.read_text())
    return in_config or (folder / "chat_template.jinja").is_file()


def ask(instance: Instance, question: str, chat: bool) -> str:
    """The greedy answer to `question`: as a chat where the model has a template, as plain text otherwise."""
    if chat:
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 64,
        }
        return instance.call("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    body = {"text": question, "sampling_params": {"temperature": 0, "max_new_tokens": 64}}
    return instance.call("/generate", body)["text"]


def format_table(seed: Instance, client: Instance, same: bool) -> str:
    """The loads of both instances side by side."""
    columns = []
    for instance in (seed, client):
        report = instance.load_report()
        rate = report["num_bytes"] / max(report["seconds"], 1e-9) / 1e9
        columns.append(
            [
                instance.name,
                report["source"],
                f"{report['num_bytes']:,}",
                f"{report['seconds']:.4f}",
                f"{rate:.2f}",
                f"{instance.ready_s:.2f} s",
            ]
        )
    labels = ["", "source", "bytes", "seconds", "GB/s", "launch to ready"]
    rows = [f"  {label:<18}{a:>18}{b:>18}" for label, a, b in zip(labels, *columns, strict=True)]
    return "\n".join([*rows, f"  {'same answer':<18}{'yes' if same else 'NO':>36}"])


def start_by_address(args: argparse.Namespace, model: Path, work: Path, running: list[Instance]) -> list[Instance]:
    """A seed, and a client that is told where it is and has no weight files."""
    bare = work / "model-without-weights"
    bare.mkdir()
    copy_without_weights(model, bare)
    logs, common = args.log_dir, common_flags(args)
    print(f"seed:   port {args.seed_port}, model {model}, log {logs / 'seed.log'}")
    flags = ["--model-path", str(model), "--engine-info-bootstrap-port", str(args.seed_bootstrap_port)]
    flags += ["--remote-instance-weight-loader-start-seed-via-transfer-engine"]
    seed = Instance("seed", args.seed_port, logs / "seed.log", flags + common)
    running.append(seed)
    seed.wait_ready(args.timeout)

    print(f"client: port {args.client_port}, config and tokenizer but no weights, log {logs / 'client.log'}")
    flags = ["--model-path", str(bare), "--engine-info-bootstrap-port", str(args.client_bootstrap_port)]
    flags += ["--load-format", "remote_instance", "--remote-instance-weight-loader-seed-instance-ip", "127.0.0.1"]
    flags += ["--remote-instance-weight-loader-seed-instance-service-port", str(args.seed_port)]
    client = Instance("client", args.client_port, logs / "client.log", flags + common)
    running.append(client)
    client.wait_ready(args.timeout)
    return [seed, client]


def start_by_name(args: argparse.Namespace, model: Path, running: list[Instance]) -> list[Instance]:
    """A metadata server, and the same command twice; only the ports differ, since both run on one machine."""
    logs = args.log_dir
    flags = ["--port", str(args.modelexpress_port)]
    server = Instance("metadata server", args.fleet_port, logs / "modelexpress.log", flags, "ramet.modelexpress_server")
    running.append(server)
    server.wait_ready(args.timeout)
    print(f"metadata server: port {args.modelexpress_port}; the fleet is shown at {server.url}/")
    config = json.dumps({"url": f"127.0.0.1:{args.modelexpress_port}"})
    flags = ["--model-path", str(model), "--load-format", "remote_instance"]
    flags += ["--remote-instance-weight-loader-backend", "modelexpress", "--modelexpress-config", config]
    flags += common_flags(args)
    print("both instances:  ramet serve", shlex.join(flags))
    instances = []
    for name, port, bootstrap_port in (
        ("first", args.seed_port, args.seed_bootstrap_port),
        ("second", args.client_port, args.client_bootstrap_port),
    ):
        own = f"--port {port} --engine-info-bootstrap-port {bootstrap_port}"
        print(f"{name + ':':<16} {own}, log {logs / f'{name}.log'}", flush=True)
        ports = ["--engine-info-bootstrap-port", str(bootstrap_port)]
        instances.append(Instance(name, port, logs / f"{name}.log", flags + ports))
        running.append(instances[-1])
        instances[-1].wait_ready(args.timeout)
    return instances


def common_flags(args: argparse.Namespace) -> list[str]:
    flags = ["--served-model-name", "demo", "--drain-timeout", str(DRAIN_TIMEOUT_S)]
    return [*flags, "--mem-fraction-static", str(MEM_FRACTION), *args.server_flags]


def run(args: argparse.Namespace, work: Path, running: list[Instance]) -> bool:
    """Start both instances and print the table. Returns whether the second is a true clone of the first."""
    model = find_model(args.model_path)
    args.log_dir.mkdir(parents=True, exist_ok=True)
    by_address = args.by_address
    instances = start_by_address(args, model, work, running) if by_address else start_by_name(args, model, running)
    chat = has_chat_template(model)
    print(f"\nquestion: {args.question}")
    answers = []
    for instance in instances:
        answers.append(ask(instance, args.question, chat))
        print(f"{instance.name}: {answers[-1]}")
    same = answers[0] == answers[1]
    print("\n" + format_table(*instances, same) + "\n", flush=True)
    is_clone = by_address or "checkpoint" not in instances[1].load_report()["source"]
    return same and is_clone


def serve(args: argparse.Namespace, instances: list[Instance]) -> None:
    """Keep both instances serving until a signal comes or one of them ends."""
    print(f"Both keep serving until Ctrl-C. Try:\n  curl {instances[-1].url}/v1/chat/completions \\")
    print("    -H 'Content-Type: application/json' \\")
    print(
        f"""    -d '{{"model": "demo", "messages": [{{"role": "user", "content": "{args.question}"}}]}}'""", flush=True
    )
    while True:
        for instance in instances:
            instance.check_alive()
        time.sleep(0.5)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(DEMO_MODEL), help="model folder or Hugging Face hub id")
    parser.add_argument("--by-address", action="store_true", help="give the client the seed's address")
    parser.add_argument("--question", default="What is a ramet?")
    parser.add_argument("--once", action="store_true", help="end after the table")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one instance may take to start")
    parser.add_argument("--seed-port", type=int, default=30000)
    parser.add_argument("--client-port", type=int, default=30100)
    parser.add_argument("--seed-bootstrap-port", type=int, default=6789)
    parser.add_argument("--client-bootstrap-port", type=int, default=6790)
    parser.add_argument("--modelexpress-port", type=int, default=8001, help="of the metadata server")
    parser.add_argument("--fleet-port", type=int, default=8002, help="of the page that shows the fleet")
    parser.add_argument("--log-dir", type=Path, default=ROOT / ".run")
    parser.add_argument("server_flags", nargs="*", help="after --: more flags for both servers")
    return parser.parse_args()


def interrupt(_signum: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> int:
    args = parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    instances: list[Instance] = []
    ok = False
    with tempfile.TemporaryDirectory(prefix="ramet-demo-") as work:
        try:
            ok = run(args, Path(work), instances)
            if not args.once:
                serve(args, instances)
        except KeyboardInterrupt:
            print("\nstopping all", flush=True)
        except DemoError as error:
            ok = False
            print(error, file=sys.stderr)
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_IGN)  # a second Ctrl-C does not leave servers behind
            ended_well = stop_all(instances)
    return 0 if ok and ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
