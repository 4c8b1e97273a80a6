"""What a model is made of: parameters, weight bytes, matrix shapes and KV bytes under tensor and pipeline parallelism.

Facts come from a Hugging Face style ``config.json`` or from the packaged catalogue (``data/models.json``). Knows no
hardware and no time. Sizes are those of one rank where a tensor-parallel degree is given.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from distserve_planner.refusal import CannotPlan, nearest

_LEARNED_POSITIONS = {"opt": 2, "gpt2": 0}  # family → rows of the position table beyond the longest sequence
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "opt", "deepseek_v3")
_DTYPE_BYTES = {"float16": 2.0, "bfloat16": 2.0, "float32": 4.0, "fp8": 1.0, "float8": 1.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture-of-experts FFN: ``active`` of ``count`` experts a token, ``shared`` always; the first layers dense."""

    count: int
    active: int
    inter: int
    shared: int = 0
    dense_layers: int = 0
    gate_bias: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention: KV is one compressed vector of ``kv_rank + rope`` a token and layer."""

    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class Matmul:
    """One matrix product of a layer: Y[tokens, n] = X[tokens, k] W[k, n], ``count`` times, on one rank."""

    name: str
    n: int
    k: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model. ``gated``: three FFN matrices (SwiGLU), else two. ``positions``: rows of a learned position table."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inter: int
    vocab: int
    max_len: int
    gated: bool
    tied: bool
    positions: int
    dtype: str
    qkv_bias: bool
    all_biases: bool
    qk_norm: bool
    experts: Experts | None = None
    latent: Latent | None = None

    # ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def parameters(self) -> int:
        """All weights, a tied embedding counted once."""
        ends = self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden
        final = self.hidden * (2 if self.all_biases else 1)
        return ends + final + sum(self.layer_parameters(i) for i in range(self.layers))

    def layer_parameters(self, layer: int, tp: int = 1) -> int:
        """Weights of one layer on one rank; norms and what cannot be split are whole on every rank."""
        norms = self.hidden * (4 if self.all_biases else 2)
        return self._attention_parameters(tp) + self._ffn_parameters(layer, tp) + norms

    def _attention_parameters(self, tp: int) -> int:
        h, d = self.hidden, self.head_dim
        if self.latent is not None:
            m = self.latent
            heads = self.heads // tp
            queries = h * m.q_rank + m.q_rank + m.q_rank * heads * (m.nope + m.rope)
            keys = h * (m.kv_rank + m.rope) + m.kv_rank + m.kv_rank * heads * (m.nope + m.value)
            return queries + keys + heads * m.value * h
        q, kv = self.heads // tp * d, self.kv_heads_of(tp) * d
        weights = h * (q + 2 * kv) + q * h
        biases = (q + 2 * kv) * (self.qkv_bias or self.all_biases) + h * self.all_biases
        return weights + biases + 2 * d * self.qk_norm

    def _ffn_parameters(self, layer: int, tp: int) -> int:
        h = self.hidden
        e = self.experts
        if e is not None and layer >= e.dense_layers:
            gate = e.count * h + e.count * e.gate_bias
            return gate + (e.count + e.shared) * 3 * h * e.inter // tp
        inter = self.inter // tp
        return h * inter * (3 if self.gated else 2) + (inter + h) * self.all_biases

    # ── under tensor and pipeline parallelism ────────────────────────────────────────────────────────────────────────

    def why_not(self, tp: int, pp: int) -> str | None:
        """A sentence when the model cannot be cut this way, else None."""
        if tp < 1 or pp < 1:
            return f"tp={tp}, pp={pp}: both must be at least 1"
        if self.heads % tp:
            return f"{self.name} has {self.heads} attention heads, which tp={tp} does not divide"
        if max(self.kv_heads, tp) % min(self.kv_heads, tp):
            return f"{self.name} has {self.kv_heads} KV heads, which tp={tp} neither divides nor copies evenly"
        inter = self.experts.inter if self.experts else self.inter
        if inter % tp:
            return f"{self.name} has an FFN of {inter}, which tp={tp} does not divide"
        if pp > self.layers:
            return f"{self.name} has {self.layers} layers, fewer than pp={pp} stages"
        return None

    def kv_heads_of(self, tp: int) -> int:
        """KV heads on one rank; copied when there are more ranks than heads."""
        return max(1, self.kv_heads // tp)

    def stage_layers(self, pp: int) -> tuple[int, ...]:
        """Layers of each stage; the first stages take what is left over."""
        least, more = divmod(self.layers, pp)
        return tuple(least + (stage < more) for stage in range(pp))

    def stages(self, pp: int) -> Iterator[range]:
        """The layers of each stage, as ranges."""
        start = 0
        for count in self.stage_layers(pp):
            yield range(start, start + count)
            start += count

    def weight_bytes(self, tp: int, pp: int, stage: int, dtype: str = "") -> float:
        """Bytes of weights on one rank of ``stage``. Embedding on the first stage, output head on the last."""
        layers = list(self.stages(pp))[stage]
        size = sum(self.layer_parameters(layer, tp) for layer in layers)
        first, last = stage == 0, stage == pp - 1
        tables = int(first) + int(last) - int(first and last and self.tied)
        size += tables * self.vocab * self.hidden // tp + first * self.positions * self.hidden
        return size * dtype_bytes(dtype or self.dtype)

    def kv_bytes_per_token(self, dtype: str = "") -> float:
        """KV bytes of one token, all layers and heads, before tensor parallelism."""
        return self.layers * self.kv_bytes_per_layer(1, dtype)

    def kv_bytes_per_layer(self, tp: int, dtype: str = "") -> float:
        """KV bytes of one token in one layer on one rank. A latent cache is whole on every rank."""
        bytes_each = dtype_bytes(dtype or ("float16" if self.dtype != "float32" else self.dtype))
        if self.latent is not None:
            return (self.latent.kv_rank + self.latent.rope) * bytes_each
        return 2 * self.kv_heads_of(tp) * self.head_dim * bytes_each

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def matmuls(self, tp: int) -> tuple[Matmul, ...]:
        """The dense matrix products of one layer on one rank, fused as serving engines fuse them.

        q, k, v in one product, gate and up in one. A mixture's experts are not here (``experts``). Raises CannotPlan
        for latent attention, for which there is no operator data.
        """
        if self.latent is not None:
            raise CannotPlan(f"{self.name} uses latent attention (MLA), for which there is no operator data yet")
        h, q = self.hidden, self.heads // tp * self.head_dim
        qkv = q + 2 * self.kv_heads_of(tp) * self.head_dim
        products = [Matmul("qkv", qkv, h), Matmul("o", h, q)]
        if self.experts is None:
            inter = self.inter // tp
            products += [Matmul("gate_up" if self.gated else "up", inter * (2 if self.gated else 1), h)]
            products += [Matmul("down", h, inter)]
        else:
            products.append(Matmul("router", self.experts.count, h))
        return tuple(products)

    @property
    def active_parameters(self) -> int:
        """Weights one token passes in the layers, the output head included."""
        layers = 0
        for i in range(self.layers):
            ffn = self._ffn_parameters(i, 1)
            e = self.experts
            if e is not None and i >= e.dense_layers:
                ffn = (e.active + e.shared) * 3 * self.hidden * e.inter + e.count * self.hidden
            layers += self._attention_parameters(1) + ffn
        return layers + self.vocab * self.hidden

    def flops(self, tokens: int, pairs: float) -> float:
        """Floating point operations for ``tokens`` new tokens that attend to ``pairs`` (query, key) pairs in all."""
        return 2.0 * tokens * self.active_parameters + 4.0 * pairs * self.layers * self.heads * self.head_dim


def dtype_bytes(dtype: str) -> float:
    """Bytes of one element. Raises CannotPlan for an unknown name."""
    if dtype not in _DTYPE_BYTES:
        raise CannotPlan(
            f"unknown data type {dtype!r}{nearest(dtype, _DTYPE_BYTES)} (known: {', '.join(_DTYPE_BYTES)})"
        )
    return _DTYPE_BYTES[dtype]


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _catalogue() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("distserve_planner").joinpath("data/models.json").read_text(encoding="utf-8")
    models: Mapping[str, Mapping[str, Any]] = json.loads(text)["models"]
    return models


def known_models() -> tuple[str, ...]:
    """Names of the packaged catalogue."""
    return tuple(_catalogue())


def load_model(name: str) -> ModelFacts:
    """A catalogue name (any case, with or without the maker), a ``config.json`` or a directory that holds one.

    Raises CannotPlan with the nearest known name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        return from_config(_read(path), path.parent.name if path.name == "config.json" else path.stem)
    known = _catalogue()
    word = name.lower().rpartition("/")[2].replace("_", "-").removeprefix("meta-")
    for candidate in (word, word.removesuffix("-instruct"), word.removesuffix("-chat"), word.removesuffix("-hf")):
        if candidate in known:
            return from_config(known[candidate], candidate)
    raise CannotPlan(f"unknown model {name!r}{nearest(word, known)} Give a config.json, or one of: {', '.join(known)}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotPlan(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise CannotPlan(f"{path} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise CannotPlan(f"{path} must hold a JSON object of model facts")
    return document


def from_config(config: Mapping[str, Any], name: str) -> ModelFacts:
    """Facts from Hugging Face configuration keys. Raises CannotPlan for a missing key or an unknown architecture."""
    family = str(config.get("model_type", "llama"))
    if family not in _FAMILIES:
        raise CannotPlan(f"{name}: architecture {family!r} is not known{nearest(family, _FAMILIES)}")

    def need(*keys: str) -> int:
        for key in keys:
            if isinstance(config.get(key), int):
                return int(config[key])
        raise CannotPlan(f"{name}: its configuration lacks {keys[0]!r}")

    hidden, heads = need("hidden_size"), need("num_attention_heads")
    max_len = need("max_position_embeddings")
    opt = family == "opt"
    return ModelFacts(
        name=name,
        family=family,
        layers=need("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        inter=need("ffn_dim", "intermediate_size") if opt else need("intermediate_size"),
        vocab=need("vocab_size"),
        max_len=max_len,
        gated=not opt,
        tied=bool(config.get("tie_word_embeddings", opt)),
        positions=max_len + _LEARNED_POSITIONS[family] if opt else 0,
        dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        all_biases=opt,
        qk_norm=family.startswith("qwen3"),
        experts=_experts(config),
        latent=_latent(config),
    )


def _experts(config: Mapping[str, Any]) -> Experts | None:
    count = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    if not count:
        return None
    return Experts(
        count=int(count),
        active=int(config.get("num_experts_per_tok", 2)),
        inter=int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        shared=int(config.get("n_shared_experts", 0)),
        dense_layers=int(config.get("first_k_dense_replace", 0)),
        gate_bias=config.get("model_type") == "deepseek_v3",
    )


def _latent(config: Mapping[str, Any]) -> Latent | None:
    if "kv_lora_rank" not in config:
        return None
    return Latent(
        q_rank=int(config["q_lora_rank"]),
        kv_rank=int(config["kv_lora_rank"]),
        nope=int(config["qk_nope_head_dim"]),
        rope=int(config["qk_rope_head_dim"]),
        value=int(config["v_head_dim"]),
    )
