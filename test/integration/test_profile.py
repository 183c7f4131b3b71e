"""Profiles of a running instance: the same passes from every rank, an end in the middle, the script that reads them."""

import gzip
import json
import signal
import sys
from collections import Counter
from pathlib import Path

import httpx
from ramet.srt.layers.cpu_kernels.build import library_path
from server_process import ServerProcess, run_script, wait_until

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "examples" / "demo_model"


def passes_in(trace: Path) -> list[str]:
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    marks = [event for event in events if event.get("cat") == "user_annotation" and "_pass[" in event["name"]]
    return [mark["name"] for mark in sorted(marks, key=lambda mark: mark["ts"])]


def test_every_rank_records_the_same_passes(tmp_path: Path) -> None:
    default = tmp_path / "default"
    traces = default / "a" / "folder"
    flags = ["--pp-size", "2", "--device", "cpu"]  # with transfers that end after their pass
    server = ServerProcess(DEMO_MODEL, tmp_path / "log", *flags, fake=False, RAMET_TORCH_PROFILER_DIR=str(default))
    with server, httpx.Client(base_url=server.wait_ready().url, timeout=60) as http:

        def generate() -> None:
            sampling = {"max_new_tokens": 6, "ignore_eos": True}
            assert http.post("/generate", json={"text": "A ramet", "sampling_params": sampling}).status_code == 200

        def refused(path: str, **body: object) -> str:
            answer = http.post(path, json=body)
            assert answer.status_code == 400
            return answer.json()["error"]["message"]

        assert "num_steps" in refused("/start_profile", num_steps=0)
        assert "one of CPU, GPU" in refused("/start_profile", activities=["TPU"])
        assert "start_step" in refused("/start_profile", start_step=3)
        (default / "link").mkdir(parents=True)
        (default / "link").rmdir()
        (default / "link").symlink_to(tmp_path)
        for outside in (DEMO_MODEL / "config.json", default / ".." / "x", default / "link" / "x", "../x", "link"):
            assert "output_dir: it must be below" in refused("/start_profile", output_dir=str(outside))
        (default / "link").unlink()
        assert "no profile" in refused("/stop_profile")

        answer = http.post("/start_profile", json={"output_dir": "a/folder", "num_steps": 3, "activities": ["CPU"]})
        assert answer.status_code == 200 and answer.json()["success"]
        assert "already" in refused("/start_profile")
        generate()
        found = wait_until(lambda: len(files := sorted(traces.glob("*.trace.json.gz"))) == 2 and files, "both traces")
        assert [path.name.partition("-rank-")[2] for path in found] == [f"{rank}.trace.json.gz" for rank in range(2)]
        assert [passes_in(path) for path in found] == [["prefill_pass[1]", "decode_pass[1]", "decode_pass[1]"]] * 2

        for _ in range(2):  # without a body: until it is stopped, at the place that the environment names
            assert http.post("/start_profile").status_code == 200
            generate()
            assert http.post("/stop_profile").status_code == 200
        found = wait_until(
            lambda: len(files := sorted(default.glob("*.trace.json.gz"))) == 4 and files, "four more traces"
        )
        assert all(Counter(passes_in(path))["decode_pass[1]"] >= 5 for path in found)

        assert http.post("/start_profile").status_code == 200
        generate()
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    assert "Traceback" not in server.output
    assert (
        len(list(default.glob("*.trace.json.gz"))) == 6 == len([path for path in default.iterdir() if path.is_file()])
    )


def test_the_script_that_sums_up_decode_passes(tmp_path: Path) -> None:
    script = [sys.executable, ROOT / "benchmark" / "profile_decode.py", "--device", "cpu", "--work-dir", tmp_path]
    done = run_script([*script, "--concurrency", "1,3", "--passes", "10", "--output", tmp_path / "out"], 120)
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads((tmp_path / "out").read_text())["values"]
    product = "ramet::linear" if library_path().is_file() else "aten::mm"
    for count in (1, 3):
        summary = values[str(count)]
        assert summary["batch_size"] == count and summary["num_passes"] == 10 and not summary["has_gpu"]
        operations = {name for name, _, _ in summary["cpu_ops"]}
        assert product in operations and len(operations) == 10
        assert f"{count} concurrent" in done.stdout and product in done.stdout
