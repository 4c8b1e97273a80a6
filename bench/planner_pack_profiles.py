"""Packs measured tables and model facts into the planner's data: `python bench/planner_pack_profiles.py SOURCE`.

SOURCE holds ``profiles/`` and ``model_configs/``. One ``.npz`` a GPU: integer shapes and float32 microseconds.
Running it twice writes the same bytes.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "planner" / "distserve_planner" / "data"
GPUS = ("h200", "h100", "a100")
SMOLLM2_135M = {  # the demo model, from its config.json
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(source: Iterable[dict[str, str]], columns: list[str], time: str) -> dict[str, np.ndarray]:
    kept = list(source)
    shapes = np.array([[int(row[c]) for c in columns] for row in kept], dtype=np.int64)
    small = np.int32 if shapes.max() < 2**31 else np.int64
    return {"shape": shapes.astype(small), "us": np.array([float(row[time]) for row in kept], dtype=np.float32)}


def tables_of(profiles: Path, gpu: str) -> dict[str, np.ndarray]:
    aic = profiles / "aiconfigurator"
    packed: dict[str, np.ndarray] = {}

    def put(name: str, part: dict[str, np.ndarray]) -> None:
        packed.update({f"{name}.{key}": value for key, value in part.items()})

    put("gemm_bf16", table(rows(aic / f"gemm_bf16_{gpu}.csv"), ["m", "n", "k"], "latency_us"))
    if (aic / f"gemm_fp8_{gpu}.csv").exists():
        put("gemm_fp8", table(rows(aic / f"gemm_fp8_{gpu}.csv"), ["m", "n", "k"], "latency_us"))
    heads = ["heads", "kv_heads"]
    put("prefill", table(rows(aic / f"attn_prefill_bf16_{gpu}.csv"), ["batch", "seq", *heads], "latency_us"))
    put("decode", table(rows(aic / f"attn_decode_bf16_{gpu}.csv"), ["batch", "context", *heads], "latency_us"))
    collectives = rows(aic / f"collectives_bf16_{gpu}.csv")
    for op, impl in sorted({(row["op"], row["impl"]) for row in collectives}):
        chosen = [row for row in collectives if (row["op"], row["impl"]) == (op, impl)]
        put(f"{op}_{impl}", table(chosen, ["gpus", "bytes"], "latency_us"))
    shape = ["tokens", "hidden", "inter", "topk", "experts", "moe_tp", "moe_ep"]
    moe = rows(aic / f"moe_bf16_{gpu}.csv")
    for routing in sorted({row["routing"] for row in moe}):
        put(f"moe_{routing}", table([r for r in moe if r["routing"] == routing], shape, "latency_us"))
    if (profiles / "apex_plus" / f"sendrecv_fp16_{gpu}.csv").exists():
        put("sendrecv", table(rows(profiles / "apex_plus" / f"sendrecv_fp16_{gpu}.csv"), ["bytes"], "latency_us"))
    dgx = profiles / "vidur" / f"p2p_fp16_{gpu}_dgx.csv"
    if dgx.exists():
        for link in ("intra_node", "inter_node"):
            put(f"p2p_{link}", table([r for r in rows(dgx) if r["link"] == link], ["bytes"], "min_us"))
        across = [r for r in rows(profiles / "vidur" / f"allreduce_fp16_{gpu}_dgx.csv") if r["nodes"] == "2"]
        if across:
            put("all_reduce_two_nodes", table(across, ["gpus", "bytes"], "min_us"))
    return packed


def main(source: Path) -> None:
    (DATA / "profiles").mkdir(parents=True, exist_ok=True)
    for gpu in GPUS:
        file = DATA / "profiles" / f"{gpu}.npz"
        np.savez_compressed(file, **tables_of(source / "profiles", gpu))
        print(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB")
    models = {p.stem: json.loads(p.read_text()) for p in sorted((source / "model_configs").glob("*.json"))}
    models["smollm2-135m"] = SMOLLM2_135M
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in models.items())
    about = "Architecture facts of public models, keyed as in a Hugging Face config.json; see README.md"
    (DATA / "models.json").write_text(
        f'{{"about": {json.dumps(about)}, "models": {{\n{lines}\n}}}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
