"""The checked-in protobuf code is what ``python protos/generate.py`` makes, and the protos keep our rules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "protos" / "distserve" / "v1").glob("*.proto"))


def test_generated_code_is_up_to_date() -> None:
    pytest.importorskip("grpc_tools")
    checked = subprocess.run(
        [sys.executable, str(ROOT / "protos" / "generate.py"), "--check"], capture_output=True, text=True, timeout=120
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_definition_is_commented_and_every_enum_has_an_unspecified_zero(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = []
    for number, line in enumerate(lines):
        defines = re.match(r"\s*(message|enum|service|rpc|oneof)\s|\s*[\w.<>, ]+\s\w+ = \d+", line)
        if defines and not re.match(r"\s*(syntax|package|import|option)\b", line):
            above = next((earlier.strip() for earlier in reversed(lines[:number]) if earlier.strip()), "")
            if not above.startswith("//") and "//" not in line:
                bare.append(f"{path.name}:{number + 1}: {line.strip()}")
    assert not bare, "\n".join(bare)
    for enum in re.finditer(r"enum (\w+) \{.*?(\w+) = 0;", path.read_text(), re.DOTALL):
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum[1]).upper()
        assert enum[2] == f"{prefix}_UNSPECIFIED"
