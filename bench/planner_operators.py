"""The operator model against measurements it has not seen: `python bench/planner_operators.py [PROFILES]`.

1. A random fifth of every table's rows, then a random seventh of its (n, k) and head shapes, predicted from the rest.
2. Step times of three models, composed without those rows; and without any row of the model's own shapes.
3. With PROFILES (a folder that holds aiconfigurator/e2e_measured.csv): mean TPOT of served closed-loop benchmarks.
4. The datasheet roofline against the measured tables.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from distserve_planner.hardware import gpu_named
from distserve_planner.latency.operators import ENGINES, OperatorLatency
from distserve_planner.latency.roofline import RooflineKernels
from distserve_planner.latency.tables import packaged
from distserve_planner.latency.validation import (
    OPERATORS,
    Errors,
    operator_errors,
    own_sites,
    random_rows,
    random_sites,
    step_errors,
)
from distserve_planner.models import load_model

MODELS = (("llama-3.1-8b", (1, 2)), ("llama-3.1-70b", (2, 4, 8)), ("qwen3-32b", (1, 2, 4)))
BATCHES = (1, 3, 8, 20, 48, 100, 200)
LENGTHS = (100, 300, 700, 1500, 3000, 6000)
SEED = 7


def line(name: str, errors: Errors) -> None:
    print(f"{name:48s} {errors.count:6d} {errors.median:8.1%} {errors.p90:8.1%} {errors.worst:8.1%}")


def operators() -> None:
    print(f"{'operator tables, rows held back':48s} {'shapes':>6s} {'median':>8s} {'P90':>8s} {'worst':>8s}")
    for gpu in map(gpu_named, ("h200", "h100", "a100")):
        for name in OPERATORS:
            if name in packaged(gpu.tables):
                table = packaged(gpu.tables)[name]
                line(f"{gpu.name} {name}: rows", operator_errors(gpu, name, random_rows(table, 0.2, SEED)))
                line(f"{gpu.name} {name}: shapes", operator_errors(gpu, name, random_sites(table, name, 0.15, SEED)))


def steps() -> None:
    print(f"\n{'step times':48s} {'points':>6s} {'median':>8s} {'P90':>8s} {'worst':>8s}")
    for gpu in map(gpu_named, ("h200", "h100")):
        rows = {n: random_rows(packaged(gpu.tables)[n], 0.2, SEED) for n in ("gemm_bf16", "prefill", "decode")}
        for name, degrees in MODELS:
            model = load_model(name)
            for tp in degrees:
                for what, held in (("fifth of rows", rows), ("own shapes", own_sites(gpu, model, tp))):
                    if OperatorLatency(model, gpu, tp).kv_capacity_tokens:
                        prefill, decode = step_errors(model, gpu, tp, held, BATCHES, LENGTHS)
                        line(f"{gpu.name} {name} tp={tp} prefill, without {what}", prefill)
                        line(f"{gpu.name} {name} tp={tp} decode, without {what}", decode)


def served(profiles: Path) -> None:
    """Mean TPOT of a closed loop = a decode step at full concurrency + the others' prefills, spread over the answer."""
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in csv.DictReader((profiles / "aiconfigurator" / "e2e_measured.csv").open(encoding="utf-8")):
        model, gpu, engine = load_model(row["model"]), gpu_named(row["gpu"]), ENGINES[row["engine"]]
        latency = OperatorLatency(model, gpu, int(row["tp"]), dtype=row["weight_dtype"], engine=engine, hold=True)
        isl, osl, clients = int(row["isl"]), int(row["osl"]), int(row["concurrency"])
        context = clients * (isl + osl // 2)
        if context > latency.kv_capacity_tokens * (2 if row["weight_dtype"] == "fp8" else 1):
            continue  # more in flight than fits: the loop is not at this concurrency
        beside = 0.5 if row["engine"] == "sglang" else 0.9  # share of the others' prefill time that a decode waits for
        prefill = latency.step_s([(isl, 0)], 0, 0) - engine.step_s
        tpot = latency.decode_s(clients, context) + beside * (clients - 1) / osl * prefill
        found[row["engine"], row["model"], row["gpu"]].append((tpot * 1e3, float(row["tpot_ms"])))
    print(f"\n{'mean TPOT of served benchmarks':48s} {'runs':>6s} {'median':>8s} {'P90':>8s} {'worst':>8s}")
    for key in sorted(found):
        pairs = np.array(found[key])
        line(" ".join(key), Errors.of(pairs[:, 0], pairs[:, 1]))
    everything = np.array([pair for pairs in found.values() for pair in pairs])
    line("all", Errors.of(everything[:, 0], everything[:, 1]))


def roofline() -> None:
    print(f"\n{'datasheet roofline against measured':48s} {'points':>6s} {'median':>8s} {'P90':>8s} {'worst':>8s}")
    for gpu in map(gpu_named, ("h200", "h100", "a100-80g")):
        for name, degrees in MODELS:
            model, tp = load_model(name), degrees[-1]
            full = OperatorLatency(model, gpu, tp)
            sheet = OperatorLatency(model, gpu, tp, kernels=RooflineKernels(gpu))
            chunks = [[(n, 0)] * b for b in BATCHES for n in LENGTHS if b * n <= 8192]
            pairs = [(sheet.step_s(c, 0, 0), full.step_s(c, 0, 0)) for c in chunks]
            pairs += [(sheet.decode_s(b, b * n), full.decode_s(b, b * n)) for b in BATCHES for n in LENGTHS]
            both = np.array(pairs)
            line(f"{gpu.name} {name} tp={tp}", Errors.of(both[:, 0], both[:, 1]))


if __name__ == "__main__":
    operators()
    steps()
    if len(sys.argv) > 1:
        served(Path(sys.argv[1]))
    roofline()
