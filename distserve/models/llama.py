"""The Llama family (Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen3): all of a model, or one rank's share of it.

RMS norm, rotary positions, grouped attention, gated SiLU. Variants are in the configuration: biases, QK norm, tying.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve.models.attention import Angles, angles_of, attention
from distserve.models.config import ModelConfig
from distserve.models.errors import UnsupportedModel
from distserve.models.rope import inverse_frequencies
from distserve.models.shard import WHOLE, Shard
from distserve.models.step import StepInput
from distserve.models.weights import Weights
from distserve_kernels.linear import Linear
from distserve_kernels.ops import Ops
from distserve_kernels.paged import LayerKv
from distserve_kernels.rotary import rotary_table


class Llama:
    """Token ids and paged KV in, logits out. Holds weights only; nothing of it changes after loading."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: Ops, max_model_len: int, shard: Shard = WHOLE
    ) -> None:
        if config.rope is None:
            raise UnsupportedModel(f"{config.architecture} needs rotary positions in its configuration")
        own, weights = shard.local(config), shard.weights(weights, config)
        vocabulary = (config.vocab_size, config.hidden)
        if shard.first:
            self.embedding = weights.take("model.embed_tokens.weight", vocabulary)
            self._embed = shard.embedding(self.embedding)
        self.layers = [LlamaLayer(own, weights, ops, i, shard) for i in shard.layers(config)]
        device, dtype = self.layers[0].input_norm.device, self.layers[0].input_norm.dtype
        if shard.last:
            self.norm = weights.take("model.norm.weight", (config.hidden,))
            self.head = shard.head(Linear(self._head_weight(config, weights, shard)), config.vocab_size)
        cos, sin = rotary_table(inverse_frequencies(config.rope, config.head_dim), max_model_len, dtype)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self._ops, self._eps, self._shard = ops, config.norm_eps, shard

    def __call__(self, step: StepInput, kv: Iterable[LayerKv], before: Tensor | None = None) -> Tensor | None:
        """Logits [sampled, vocab] of ``step.sample_rows``; None when no row is sampled.

        A later stage is given what the one before it returned, and all stages but the last return the residual stream
        [tokens, hidden].
        """
        residual = self._embed(step.token_ids) if before is None else before
        angles = angles_of(step, self.cos, self.sin)
        x = torch.zeros_like(residual)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, angles, step, layer_kv)
        if not self._shard.last:
            return residual + x
        if step.sample_rows is None:
            return None
        x, residual = x.index_select(0, step.sample_rows), residual.index_select(0, step.sample_rows)
        x, _ = self._ops.add_rms_norm(x, residual, self.norm, self._eps)
        return self.head(x)

    def _head_weight(self, config: ModelConfig, weights: Weights, shard: Shard) -> Tensor:
        """A tied head shares the embedding's memory where both are on one rank."""
        if config.tied and shard.first:
            return self.embedding
        name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        return weights.take(name, (config.vocab_size, config.hidden))


class LlamaLayer:
    """One decoder layer. The residual stream travels beside ``x`` so that each norm adds and normalizes at once."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, index: int, shard: Shard = WHOLE) -> None:
        at = f"model.layers.{index}"
        self.attention = LlamaAttention(config, weights, ops, f"{at}.self_attn", shard)
        self.mlp = LlamaMlp(config, weights, ops, f"{at}.mlp", shard)
        self.input_norm = weights.take(f"{at}.input_layernorm.weight", (config.hidden,))
        self.post_norm = weights.take(f"{at}.post_attention_layernorm.weight", (config.hidden,))
        self._ops, self._eps = ops, config.norm_eps

    def __call__(
        self, x: Tensor, residual: Tensor, angles: Angles, step: StepInput, kv: LayerKv
    ) -> tuple[Tensor, Tensor]:
        x, residual = self._ops.add_rms_norm(x, residual, self.input_norm, self._eps)
        x = self.attention(x, angles, step, kv)
        x, residual = self._ops.add_rms_norm(x, residual, self.post_norm, self._eps)
        return self.mlp(x), residual


class LlamaAttention:
    """Grouped attention with rotary positions; Q, K and V are one matrix."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, at: str, shard: Shard = WHOLE) -> None:
        self._heads, self._kv_heads, self._dim = config.heads, config.kv_heads, config.head_dim
        sizes = {"q_proj": config.heads, "k_proj": config.kv_heads, "v_proj": config.kv_heads}
        self.qkv = Linear(
            torch.cat([weights.take(f"{at}.{p}.weight", (n * self._dim, config.hidden)) for p, n in sizes.items()]),
            torch.cat([weights.take(f"{at}.{p}.bias", (n * self._dim,)) for p, n in sizes.items()])
            if config.qkv_bias
            else None,
        )
        out = Linear(
            weights.take(f"{at}.o_proj.weight", (config.hidden, config.heads * self._dim)),
            weights.take(f"{at}.o_proj.bias", (config.hidden,)) if config.output_bias else None,
        )
        self.out = shard.reduced(out)
        self.qk_norm = self._qk_norm_weight(weights, at) if config.qk_norm else None
        self._ops, self._eps, self._scale = ops, config.norm_eps, config.head_dim**-0.5

    def __call__(self, x: Tensor, angles: Angles, step: StepInput, kv: LayerKv) -> Tensor:
        tokens = x.shape[0]
        qkv = self.qkv(x).view(tokens, -1, self._dim)
        if self.qk_norm is not None:
            rotated = qkv[:, : self._heads + self._kv_heads]
            rotated.copy_(F.rms_norm(rotated, (self._dim,), None, self._eps).mul_(self.qk_norm))
        out = attention(self._ops, qkv, angles, step, kv, self._scale)
        return self.out(out.view(tokens, -1))

    def _qk_norm_weight(self, weights: Weights, at: str) -> Tensor:
        """[heads + kv_heads, dim]: the norm weight of each query head, then of each key head."""
        q = weights.take(f"{at}.q_norm.weight", (self._dim,)).expand(self._heads, -1)
        k = weights.take(f"{at}.k_norm.weight", (self._dim,)).expand(self._kv_heads, -1)
        return torch.cat((q, k))


class LlamaMlp:
    """Gated SiLU; gate and up are one matrix."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, at: str, shard: Shard = WHOLE) -> None:
        wide, hidden = config.intermediate, config.hidden
        self.gate_up = Linear(
            torch.cat([weights.take(f"{at}.{p}.weight", (wide, hidden)) for p in ("gate_proj", "up_proj")]),
            torch.cat([weights.take(f"{at}.{p}.bias", (wide,)) for p in ("gate_proj", "up_proj")])
            if config.mlp_bias
            else None,
        )
        down = Linear(
            weights.take(f"{at}.down_proj.weight", (hidden, wide)),
            weights.take(f"{at}.down_proj.bias", (hidden,)) if config.mlp_bias else None,
        )
        self.down = shard.reduced(down)
        self._silu_mul = ops.silu_mul

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self._silu_mul(self.gate_up(x)))
