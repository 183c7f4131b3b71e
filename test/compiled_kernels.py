"""Compiles kernels for experts of single rows for a Hopper GPU, without one: `python test/compiled_kernels.py`."""

from typing import Any


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    """Down to the GPU's code. Pointers are to bfloat16 and numbers are int32 where `types` does not say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types.get(name) or ("*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True} | options)


def main() -> None:
    from ramet.srt.layers.kernels.packed_gemv import _packed_gemv_kernel
    from ramet.srt.layers.kernels.packed_row import _packed_row_kernel

    ids = {"values_ptr": "*i32", "zeros_ptr": "*i32", "ids_ptr": "*i32"}
    common = {"HAS_EXPERTS": True, "BITS": 4, "HAS_BIAS": False, "ACTIVATION": "silu", "EARLY": True}
    mxfp4 = {"NUMBERS": "e2m1", "SCALES": "exponent", "OUTER": "", "HAS_ZEROS": False}
    tile = {"BLOCK_ROWS": 8, "BLOCK_WORDS": 128, "GROUPS": 32}
    compile_kernel(
        _packed_gemv_kernel, ids | {"scales_ptr": "*u8", "outer_ptr": "*fp32"}, common | mxfp4 | tile, num_warps=4
    )
    gptq = {"GROUP_COLUMNS": 128, "ZERO_ONES": 1, "IS_WHOLE": True, "IS_SPLIT": True}
    tile = {"BLOCK_WORDS": 128, "RUNS": 4, "STEPS": 8, "LOADS": 4}
    types = ids | {"scales_ptr": "*fp16", "partial_ptr": "*fp32", "counts_ptr": "*i32"}
    compile_kernel(_packed_row_kernel, types, common | gptq | tile, num_warps=4, maxnreg=128)


if __name__ == "__main__":
    main()
