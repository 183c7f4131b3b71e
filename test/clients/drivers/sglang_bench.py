"""Starts SGLang's serving benchmark: `sglang_bench.py ARGUMENTS`, those of `python -m sglang.bench_serving`.

The benchmark takes one constant from the engine, which wants CUDA's packages to be imported: it is handed in.
"""

import sys
from types import ModuleType

ENGINE_MODULE = "sglang.srt.disaggregation.utils"

stand_in = ModuleType(ENGINE_MODULE)
stand_in.FAKE_BOOTSTRAP_HOST = "2.2.2.2"
sys.modules[ENGINE_MODULE] = stand_in

from sglang.bench_serving import cli_main  # noqa: E402  # after the stand-in, which it imports

cli_main()
