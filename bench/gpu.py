"""Everything that wants a GPU, in one command: the tests that are skipped elsewhere, then all measurements.

    PYTHONPATH=.:kernels:planner python bench/gpu.py

Each part is a process of its own with a time limit, its output goes to the terminal and to ``--logs``, and a part that
fails keeps no other from running; the last lines say what became of each, and the exit code is 1 if any failed. Parts
can be named, to run some of them: ``python bench/gpu.py kernels transfer``. The ``cluster`` part needs all that the
project depends on; the others torch, Triton, transformers, safetensors, protobuf, xxhash, pytest and pytest-timeout.

``--list`` prints the parts and their commands, and needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("-c", "bench/gpu_pytest.ini", "--rootdir", ".", "-q", "-p", "no:cacheprovider")
PYTEST = (sys.executable, "-m", "pytest", *OPTIONS)
MEASURE = (sys.executable, "bench/kernels_gpu.py", "--only")


@dataclass(frozen=True, slots=True)
class Part:
    """One command. ``limit_s``: it is killed then, and counts as failed."""

    name: str
    command: tuple[str, ...]
    limit_s: float


PARTS = (
    Part("kernels", (*PYTEST, "tests/kernels", "--deselect", "tests/kernels/test_gpu_bench.py"), 300),
    Part(
        "engine",
        (*PYTEST, *(f"tests/engine/test_{name}.py" for name in ("graphs", "device_steps", "triton_forward"))),
        300,
    ),
    Part("transfer", (*PYTEST, "-m", "gpu", "tests/transfer"), 300),
    Part("cluster", (*PYTEST, "-m", "gpu", "tests/e2e/test_gpu.py"), 600),
    Part("measure kernels", (*MEASURE, "kernels"), 400),
    Part("measure engine", (*MEASURE, "engine"), 500),
    Part("measure ipc", (*MEASURE, "ipc"), 200),
)


def run(part: Part, logs: Path) -> str:
    """Run one part; what became of it, in a word or two."""
    print(f"\n══ {part.name}: {' '.join(part.command[1:])}", flush=True)
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = os.pathsep.join([*(str(ROOT / p) for p in (".", "kernels", "planner", "bench"))])
    environ["PYTHONUNBUFFERED"] = "1"
    began = time.monotonic()
    log = logs / f"{part.name.replace(' ', '_')}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # and whatever it started
            process.wait()
            code = None
    lines = log.read_text(errors="replace").splitlines()
    print("\n".join(lines[-60:]), flush=True)
    word = "ok" if code == 0 else f"over its {part.limit_s:g} s" if code is None else f"FAILED ({code})"
    return f"{part.name:16} {word:16} {time.monotonic() - began:6.0f} s   {log}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu", help="folder for the outputs")
    parser.add_argument("--list", action="store_true", help="print the parts and their commands")
    parsed = parser.parse_args()
    if unknown := set(parsed.parts) - {part.name for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    chosen = [part for part in PARTS if not parsed.parts or part.name in parsed.parts]
    if parsed.list:
        for part in chosen:
            print(f"{part.name:16} at most {part.limit_s:g} s: {' '.join(part.command[1:])}")
        return
    import torch  # seconds, and not for --list

    if not torch.cuda.is_available():
        raise SystemExit("gpu: there is no CUDA device here; --list says what would run")
    parsed.logs.mkdir(parents=True, exist_ok=True)
    told = [run(part, parsed.logs) for part in chosen]
    print("\n" + "\n".join(told))
    sys.exit(any(" ok " not in line for line in told))


if __name__ == "__main__":
    main()
