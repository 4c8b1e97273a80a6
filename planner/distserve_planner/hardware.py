"""Accelerators as their datasheets describe them: what a roofline and a memory check need. Knows no model.

Figures are per device: memory as the driver reports it, dense (not sparse) arithmetic rates, link rates in one
direction. Sources: NVIDIA's product datasheets; HBM and FLOPS of H200, H100 and A100 are those aiconfigurator uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distserve_planner.refusal import CannotPlan, nearest, number, only_known

GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator type. ``sms`` is its count of compute units; ``nvlink_bytes_s`` 0 where there is none.

    ``tables`` names the packaged measured tables that describe it, empty when there are none.
    """

    name: str
    memory_bytes: float
    hbm_bytes_s: float
    flops: float  # bf16 / fp16, dense
    flops_fp8: float = 0.0  # 0: none
    nvlink_bytes_s: float = 0.0
    pcie_bytes_s: float = 25e9
    sms: int = 100
    tables: str = ""
    price_per_hour: float = 0.0  # 0: not told

    @property
    def rate(self) -> dict[str, float]:
        """FLOP/s by weight type."""
        return {"bf16": self.flops, "fp8": self.flops_fp8 or self.flops}


_KNOWN = (
    Gpu("h200", 140.4 * GIB, 4800e9, 989e12, 1979e12, 450e9, 55e9, 132, "h200"),
    Gpu("h100", 79.6 * GIB, 3350e9, 989e12, 1979e12, 450e9, 55e9, 132, "h100"),
    Gpu("a100-80g", 80.0 * GIB, 2039e9, 312e12, 0.0, 300e9, 25e9, 108, "a100"),
    Gpu("a100-40g", 40.0 * GIB, 1555e9, 312e12, 0.0, 300e9, 25e9, 108, "a100"),
    Gpu("b200", 178.0 * GIB, 8000e9, 2250e12, 4500e12, 900e9, 55e9, 148),
    Gpu("l40s", 45.0 * GIB, 864e9, 362e12, 733e12, 0.0, 25e9, 142),
    Gpu("l4", 22.5 * GIB, 300e9, 121e12, 242e12, 0.0, 25e9, 58),
    Gpu("a10g", 22.5 * GIB, 600e9, 70e12, 0.0, 0.0, 25e9, 80),
    Gpu("v100-32g", 32.0 * GIB, 900e9, 125e12, 0.0, 150e9, 12e9, 80),
    Gpu("rtx-4090", 24.0 * GIB, 1008e9, 165e12, 330e12, 0.0, 25e9, 128),
    Gpu("cpu", 16.0 * GIB, 20e9, 0.2e12, 0.0, 0.0, 10e9, 2),
)
GPUS = {gpu.name: gpu for gpu in _KNOWN}
_ALIASES = {
    "a100": "a100-80g",
    "a100-80gb": "a100-80g",
    "a100-sxm4-80gb": "a100-80g",
    "a100-40gb": "a100-40g",
    "h100-80g": "h100",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "h200-141gb": "h200",
    "v100": "v100-32g",
    "4090": "rtx-4090",
}
_KEYS = {
    "like": "",
    "memory_gib": "memory_bytes",
    "hbm_gbs": "hbm_bytes_s",
    "tflops": "flops",
    "tflops_fp8": "flops_fp8",
    "nvlink_gbs": "nvlink_bytes_s",
    "pcie_gbs": "pcie_bytes_s",
    "sms": "sms",
    "price_per_hour": "price_per_hour",
}
_SCALE = {"memory_gib": GIB, "hbm_gbs": 1e9, "tflops": 1e12, "tflops_fp8": 1e12, "nvlink_gbs": 1e9, "pcie_gbs": 1e9}


def gpu_named(name: str) -> Gpu:
    """The datasheet of a known type. Raises CannotPlan with the nearest name."""
    word = name.lower().replace("_", "-").replace("nvidia-", "")
    word = _ALIASES.get(word, word)
    if word not in GPUS:
        raise CannotPlan(
            f"unknown GPU type {name!r}{nearest(word, [*GPUS, *_ALIASES])} (known: {', '.join(GPUS)}; another can be "
            "described under gpu_types with memory_gib, hbm_gbs and tflops)"
        )
    return GPUS[word]


def gpu_described(name: str, document: Mapping[str, Any]) -> Gpu:
    """A type from a cluster file's own description, optionally ``like`` a known one. Raises CannotPlan.

    A changed memory, bandwidth or arithmetic rate drops the measured tables: they describe another device.
    """
    where = f"gpu_types.{name}"
    only_known(document, _KEYS, where)
    base = gpu_named(str(document["like"])) if "like" in document else None
    values: dict[str, Any] = {
        field: number(document[key], f"{where}.{key}", -1.0 if key == "price_per_hour" else 0.0) * _SCALE.get(key, 1.0)
        for key, field in _KEYS.items()
        if field and key in document
    }
    if "sms" in values:
        values["sms"] = int(values["sms"])
    if base is not None:
        other = {"hbm_bytes_s", "flops", "sms"} & values.keys()
        tables = "" if other else base.tables
        return dataclasses.replace(base, name=name, tables=tables, **values)
    for key in ("memory_gib", "hbm_gbs", "tflops"):
        if key not in document:
            raise CannotPlan(f"{where}: a GPU type needs memory_gib, hbm_gbs and tflops (or `like:` a known type)")
    return Gpu(name=name, **values)
