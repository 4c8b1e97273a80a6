"""Every Triton kernel becomes machine code of a GPU that is not there: Triton brings its own assembler.

It shows that the kernels compile, fit the processor's shared memory, multiply on tensor cores and load wide; neither
that they are right there (the interpreter shows the arithmetic) nor how fast they are.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'distserve[dev]' has it on Linux")
if platform.machine() not in ("x86_64", "aarch64"):
    pytest.skip("Triton brings no assembler for this processor", allow_module_level=True)

HERE = Path(__file__).resolve()
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of one processor, at most for one program


@pytest.mark.parametrize("architecture", sorted(SHARED_BYTES))
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parents[2] / "kernels")}
    done = subprocess.run(
        [sys.executable, str(HERE.with_name("compile_kernels.py")), str(architecture)],
        env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({one["kernel"] for one in made}) == 10
    for one in made:
        assert one["machine_code_bytes"] > 0 and one["wide_loads"] > 0, one
        assert one["shared_bytes"] <= SHARED_BYTES[architecture], one
        assert one["local_memory"] == 0, one
        if one["kernel"] in ("_prefill", "_decode"):
            assert one["tensor_core_products"] > 0 and one["async_copies"] > 0, one
