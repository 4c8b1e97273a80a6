"""The one way our protobuf code is made: ``python protos/generate.py`` writes it, ``--check`` only compares.

The proto path is the Python path, so ``protos/distserve/v1/core.proto`` becomes ``distserve/v1/core_pb2.py``, with
nothing rewritten. Needs grpcio-tools of the version pinned here: its output runs on every protobuf we allow.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

GRPC_TOOLS = "1.80.0"
PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
ENDINGS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def sources() -> list[Path]:
    """All our proto files, relative to ``protos/``, in a fixed order."""
    return sorted(path.relative_to(PROTOS) for path in PROTOS.rglob("*.proto"))


def generate(into: Path) -> list[Path]:
    """Compile every proto into ``into``; returns the files made, relative to it."""
    names = [str(name) for name in sources()]
    outputs = [f"--python_out={into}", f"--pyi_out={into}", f"--grpc_python_out={into}"]
    if protoc.main(["protoc", f"-I{PROTOS}", f"-I{WELL_KNOWN}", *outputs, *names]) != 0:
        raise SystemExit("protoc refused the files above; nothing was changed outside the target folder")
    return [name.with_name(name.stem + ending) for name in sources() for ending in ENDINGS]


def stale() -> list[str]:
    """Checked-in generated files that are missing, differ from what would be made, or have no proto any more."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        wrong = [str(n) for n in fresh if not _same(ROOT / n, Path(folder) / n)]
    packages = {ROOT / name.parent for name in sources()}
    present = {p.relative_to(ROOT) for package in packages for p in package.glob("*_pb2*.py*")}
    return wrong + sorted(str(name) for name in present - set(fresh) if name.suffix != ".pyc")


def _same(ours: Path, fresh: Path) -> bool:
    return ours.is_file() and ours.read_bytes() == fresh.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the checked-in code is stale")
    arguments = parser.parse_args()
    if (have := importlib.metadata.version("grpcio-tools")) != GRPC_TOOLS:
        print(f"grpcio-tools is {have}, but the code is made with {GRPC_TOOLS}: pip install grpcio-tools=={GRPC_TOOLS}")
        return 1
    if arguments.check:
        if wrong := stale():
            print("stale, run `python protos/generate.py`:", *wrong, sep="\n  ")
        return 1 if wrong else 0
    for name in generate(ROOT):
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
