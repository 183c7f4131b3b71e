"""Start-up time is a feature: the processes that don't compute must not import what takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

PYTHON_FOLDER = Path(__file__).resolve().parents[2] / "python"
HEAVY = ("torch", "transformers", "mooncake", "llguidance", "numpy", "requests")
WEB = ("fastapi", "uvicorn", "pydantic")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("ramet", (*HEAVY, *WEB, "zmq")),
        ("ramet.cli", (*HEAVY, *WEB, "zmq")),
        ("ramet.launch_server", (*HEAVY, *WEB, "zmq", "msgspec", "argparse")),
        ("ramet.srt.entrypoints.launch", (*HEAVY, *WEB, "zmq", "tokenizers", "huggingface_hub")),
        ("ramet.srt.managers.detokenizer_manager", (*HEAVY, *WEB, "huggingface_hub", "jinja2")),
        ("ramet.srt.entrypoints.http_server", (*HEAVY, "huggingface_hub", "jinja2")),
        ("ramet.srt.entrypoints.engine", (*HEAVY, "fastapi", "uvicorn", "huggingface_hub", "jinja2")),
        ("ramet.srt.model_loader.client.seeds_by_address", ("torch", "requests", "grpc", "transformers")),
        ("ramet.trainer", (*WEB, "zmq", "transformers", "mooncake", "llguidance", "grpc", "tokenizers")),
    ],
)
def test_what_is_not_imported(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(PYTHON_FOLDER), "PATH": "/usr/bin:/bin"},
    )
    assert not set(result.stdout.split()) & set(forbidden)
