"""Owns the package's metadata and dependencies; docs/dependencies.md says why each of them is there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "python/ramet/__init__.py").read_text()).group(1)

REQUIREMENTS = [
    "torch>=2.11",
    "fastapi>=0.117",
    "huggingface_hub>=0.30",
    "jinja2>=3.1",
    "llguidance>=1.8",
    "msgspec>=0.21",
    "numpy>=1.26",
    "prometheus_client>=0.20",
    "psutil>=5.9",
    "pydantic>=2.8",
    "pyyaml>=6.0.1",
    "pyzmq>=26",
    "requests>=2.31",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "tqdm>=4.66",
    "uvicorn>=0.34",
    "uvloop>=0.20",
    "xxhash>=3.4.1",
]

EXTRAS = {
    # Which build of Mooncake's TransferEngine carries weights between hosts: exactly one of the three.
    "cpu": ["mooncake-transfer-engine-non-cuda>=0.3.10"],
    "cuda12": ["mooncake-transfer-engine>=0.3.10"],
    "cuda13": ["mooncake-transfer-engine-cuda13>=0.3.10"],
    # Finding seeds through a metadata server, and that server.
    "modelexpress": ["grpcio>=1.66", "protobuf>=5.27.2", "redis>=5.2"],
    # Traces for an OpenTelemetry collector.
    "otel": [
        "opentelemetry-exporter-otlp-proto-grpc>=1.30",
        "opentelemetry-exporter-otlp-proto-http>=1.30",
        "opentelemetry-sdk>=1.30",
    ],
    # Attention of long prompts on GPUs from compute capability 9.0 on, where it is faster than Ramet's.
    "cudnn": ["nvidia-cudnn-frontend>=1.24.1"],
    "test": [
        "aiohttp>=3.9",
        "compose-spec>=0.2",
        "grpcio-health-checking>=1.66",
        "grpcio-tools>=1.66",
        "hypothesis>=6.100",
        "httpx>=0.27",
        "kubernetes-validate>=1.35",
        "mypy>=1.10",
        "openai>=1.100",
        "pytest>=8.2",
        "pytest-asyncio>=0.24",
        "pytest-timeout>=2.3.1",
        "pytest-xdist>=3.8",
        "ruff>=0.9",
        "triton>=3.6; platform_system == 'Linux'",  # the kernels' tests run in its interpreter, without a GPU
        "transformers>=5.0",
        "types-requests>=2.31",
    ],
}

setup(
    name="ramet",
    version=VERSION,
    description="An LLM serving engine whose new instances take their weights from running instances",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "python"},
    packages=find_packages("python"),
    package_data={
        "ramet": ["py.typed"],
        "ramet.srt.entrypoints.http": ["docs.html"],
        "ramet.srt.layers.cpu_kernels": ["native/*.cpp", "native/*.h"],
        "ramet.srt.modelexpress": ["server/page/*", "proto/*.proto", "proto/*.pyi"],
    },
    python_requires=">=3.11",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ramet=ramet.cli:main"]},
)
