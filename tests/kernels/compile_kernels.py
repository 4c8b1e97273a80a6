"""Compiles every Triton kernel for one GPU architecture, with no GPU: ``python compile_kernels.py 90``.

Prints one JSON object a kernel: what the machine code asks for and is made of. Arguments are as on
an 8B model: bfloat16, pointers and strides that 16 divides. Needs Triton uninterpreted, so it is a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distserve_kernels.triton import decode, gate, kv_move, norm, prefill, rotary, sampling

DOTS = {"DIM": 128, "WIDEN": False, "PRECISION": "tf32"}
CONSTANTS: dict[str, dict[str, Any]] = {
    "_rms_norm": {"ADD": True, "BLOCK": 4096},
    "_silu_mul": {},
    "_rotary_kv_write": {"HALF": 64},
    "_kv_write": {"HEADS": 32, "DIM": 64},
    "_decode": DOTS | {"GROUP": 16},
    "_reduce": {"DIM": 128, "SPLITS": 4},
    "_prefill": DOTS | {"wide": 1},
    "_move": {"INTO_POOL": False, "SUM": True, "BLOCK": 4096},
    "_checksum": {"BLOCK": 4096},
    "_sample": {"BLOCK": 4096},
}
KERNELS = (
    *(norm._rms_norm, gate._silu_mul, rotary._rotary_kv_write, rotary._kv_write, decode._decode, decode._reduce),
    *(prefill._prefill, kv_move._move, kv_move._checksum, sampling._sample),
)
WIDE = ("positions_ptr", "slots_ptr", "sums_ptr", "ids_ptr")
NARROW = ("tables_ptr", "lengths_ptr", "firsts_ptr", "starts_ptr", "blocks_ptr", "pool_ptr", "staging_ptr", "top_k_ptr")
FLOATS = ("mixed_ptr", "stats_ptr", "scores_ptr")
DOUBLES = ("temperature_ptr", "top_p_ptr", "min_p_ptr", "points_ptr")
UNEVEN = ("kv_heads", "group", "splits")


def kind(name: str) -> str:
    """The type of an argument, by its name."""
    if name in ("eps", "scale_log2"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    kinds = {"*i64": WIDE, "*i32": NARROW, "*fp32": FLOATS, "*fp64": DOUBLES}
    return next((found for found, names in kinds.items() if name in names), "*bf16")


def setting(kernel: Any) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """(function, constants, options) of the first setting that a kernel is tuned over, or of the only one."""
    if isinstance(kernel, triton.JITFunction):
        return kernel, {}, {"num_warps": 8}
    config = kernel.configs[0]
    return kernel.fn, config.kwargs, {"num_warps": config.num_warps, "num_stages": config.num_stages}


def compiled(function: Any, constants: dict[str, Any], options: dict[str, int], architecture: int) -> dict[str, Any]:
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and name not in UNEVEN
    }
    source = ASTSource(
        fn=function, signature=signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=even
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = made.asm["ptx"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return {
        "kernel": function.__name__,
        "setting": {**constants, **options},
        "shared_bytes": made.metadata.shared,
        "machine_code_bytes": len(made.asm["cubin"]),
        "async_copies": count(r"cp\.async\.c[ag]"),
        "tensor_core_products": count(r"mma\.sync|wgmma\.mma"),
        "wide_loads": count(r"ld\.global[\w.:]*\.v[24]"),
        "local_memory": count(r"\.local\b"),
    }


def main() -> None:
    for kernel in KERNELS:
        function, constants, options = setting(kernel)
        fixed = {**CONSTANTS[function.__name__], **constants}
        print(json.dumps(compiled(function, fixed, options, int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
