"""The kernel in Gluon, which no interpreter runs: it compiles for GPUs; test/gpu has what it computes."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys
import triton
from ramet.srt.layers.kernels import awq_row
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

capability, kind, activation, leaves_sums = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
kernel, tile = awq_row._awq_row_kernel, awq_row.TILE
constants = {
    "GROUP": 128, "X_GROUPS": 4, "WORDS": tile.words, "STEP": awq_row.STEP, "NUM_STAGES": tile.num_stages,
    "NUM_WARPS": tile.num_warps, "WORDS_LAYOUT": awq_row.words_layout(tile),
    "SCALES_LAYOUT": awq_row.scales_layout(tile), "HAS_BIAS": True, "ACTIVATION": activation,
    "EARLY": capability >= 90, "INPUT": kind, "X_PARTS": 8 if kind == "gated" else 1,
    "BLOCK_SQUARES": 32 if kind == "unscaled" else 1, "LEAVES_SUMS": leaves_sums,
}
types = dict(x_ptr="*fp32" if kind == "gated" else "*bf16", squares_ptr="*fp32", values_ptr="*i32", scales_ptr="*fp16",
             zeros_ptr="*i32", bias_ptr="*bf16", out_ptr="*fp32" if leaves_sums else "*bf16", partial_ptr="*fp32",
             counts_ptr="*i32", eps="fp32")
names = kernel.arg_names
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
aligned = [place for place, name in enumerate(names) 
           if name.endswith(("_ptr", "_stride", "num_words"))]
source = GluonASTSource(
    fn=kernel, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
)
options = {"num_warps": tile.num_warps, "launch_pdl": capability >= 90}
compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
print(compiled.metadata.shared, "cp.async" in compiled.asm["ptx"], "local.u32" in compiled.asm["ptx"])
"""


@pytest.mark.parametrize(
    ("capability", "kind", "activation", "leaves_sums"),
    [
        (90, "row", "silu", False),
        (80, "row", "", False),
        (80, "row", "", True),
        (90, "unscaled", "", True),
        (90, "gated", "silu", True),
    ],
)
def test_it_compiles(capability, kind, activation, leaves_sums, tmp_path):
    """Without spills, and with words that are copied to shared memory as fast as the GPU can."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(capability), kind, activation, str(leaves_sums)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shared, copies, spills = done.stdout.split()
    assert int(shared) <= 36 * 1024 and copies == "True" and spills == "False"
