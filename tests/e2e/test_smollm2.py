"""The real model: SmolLM2-135M, real prompts, tokens of transformers through every layout and link.

The default run takes a few prompts through 1P1D. The whole matrix (40 prompts × 48 tokens × 7 ways, some minutes) is
asked for by name: ``pytest -m soak tests/e2e``; it reads the prompts of ``../shared/traces`` and skips without them.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from distserve.core.types import Role
from distserve.models.catalog import resolve_model
from distserve.models.errors import ModelError
from tests.e2e.inprocess import all_free, cluster
from tests.oracle import Oracle
from tests.shells.cluster import answer, request

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
LAYOUTS = {"1P1D": (P, D), "2P2D": (P, P, D, D), "1P2D": (P, D, D), "2M": (M, M)}
WAYS = [(layout, link) for layout in LAYOUTS for link in ("shm", "gloo") if (layout, link) != ("2M", "gloo")]
TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "prompts.jsonl.gz"
QUESTIONS = (
    "What is the capital of France? Explain in two sentences.",
    "Write a haiku about two machines that share one memory.",
    "List the first ten prime numbers and say why 1 is not among them.",
)


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return resolve_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


async def compare(model: Path, prompts: list[list[int]], wanted: list[list[int]], layout: str, transfer: str) -> None:
    async with cluster(model, LAYOUTS[layout], transfer=transfer, dtype="float32") as running:
        work = (
            answer(running.shell, replace(request(f"r{i}", p, len(w)), timeout_s=600.0))
            for i, (p, w) in enumerate(zip(prompts, wanted, strict=True))
        )
        for index, ((tokens, end), want) in enumerate(zip(await asyncio.gather(*work), wanted, strict=True)):
            assert tokens == want, f"prompt {index} of {len(prompts[index])} tokens"
            assert (end.account.timings.kv_bytes_moved > 0) == (layout != "2M")
        await all_free(running)


async def test_a_few_prompts_through_prefill_handoff_and_decode(
    model: Path, oracle: Oracle, tokenizer: Tokenizer
) -> None:
    prompts = [tokenizer.encode(q).ids for q in QUESTIONS]
    await compare(model, prompts, [oracle(p, 12) for p in prompts], "1P1D", "shm")


@pytest.fixture(scope="module")
def matrix(oracle: Oracle, tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Forty real prompts cut to 16–900 tokens, and 48 tokens of answer to each."""
    if not TRACE.exists():
        pytest.skip(f"no prompts at {TRACE.name}")
    with gzip.open(TRACE, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [(row.get("system") or "") + row["turns"][0]["user"] for row in rows[:: len(rows) // 40]][:40]
    lengths = [16 + round(i * (900 - 16) / 39) for i in range(40)]
    ids = [tokenizer.encode(text).ids for text in texts]
    filler = [token for row in ids for token in row]
    prompts = [(row + filler)[:n] for row, n in zip(ids, lengths, strict=True)]
    return prompts, [oracle(p, 48) for p in prompts]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("layout", "transfer"), WAYS)
async def test_forty_prompts(
    model: Path, matrix: tuple[list[list[int]], list[list[int]]], layout: str, transfer: str
) -> None:
    await compare(model, *matrix, layout, transfer)
