"""OPT (arXiv 2205.01068): learned positions, LayerNorm before each part, biases, ReLU; all of it or a rank's share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distserve.models.attention import attention
from distserve.models.config import ModelConfig
from distserve.models.shard import WHOLE, Shard
from distserve.models.step import StepInput
from distserve.models.weights import Weights
from distserve_kernels.linear import Linear
from distserve_kernels.ops import Ops
from distserve_kernels.paged import LayerKv

_POSITION_OFFSET = 2  # the checkpoint's table keeps two rows that no position uses


class Opt:
    """Token ids and paged KV in, logits out. Holds weights only; nothing of it changes after loading."""

    def __init__(
        self, config: ModelConfig, weights: Weights, ops: Ops, max_model_len: int, shard: Shard = WHOLE
    ) -> None:
        at = "model.decoder" if weights.has("model.decoder.embed_tokens.weight") else "decoder"
        own, weights = shard.local(config), shard.weights(weights, config)
        vocabulary = (config.vocab_size, config.hidden)
        if shard.first:
            self.embedding = weights.take(f"{at}.embed_tokens.weight", vocabulary)
            self._embed = shard.embedding(self.embedding)
            rows = config.max_positions + _POSITION_OFFSET
            positions = weights.take(f"{at}.embed_positions.weight", (rows, config.hidden))
            self.positions = positions[_POSITION_OFFSET : _POSITION_OFFSET + max_model_len].contiguous()
        self.layers = [OptLayer(own, weights, ops, f"{at}.layers.{i}", shard) for i in shard.layers(config)]
        if shard.last:
            self.norm = LayerNorm(config, weights, f"{at}.final_layer_norm") if config.final_norm else None
            if config.tied and shard.first:
                head = self.embedding
            else:
                head = weights.take(f"{at}.embed_tokens.weight" if config.tied else "lm_head.weight", vocabulary)
            self.head = shard.head(Linear(head), config.vocab_size)
        self._shard = shard

    def __call__(self, step: StepInput, kv: Iterable[LayerKv], before: Tensor | None = None) -> Tensor | None:
        """Logits [sampled, vocab] of ``step.sample_rows``; None when no row is sampled.

        A later stage is given what the one before it returned, and all stages but the last return the residual stream
        [tokens, hidden].
        """
        x = self._embed(step.token_ids) + F.embedding(step.positions, self.positions) if before is None else before
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x = layer(x, step, layer_kv)
        if not self._shard.last:
            return x
        if step.sample_rows is None:
            return None
        x = x.index_select(0, step.sample_rows)
        return self.head(x if self.norm is None else self.norm(x))


class OptLayer:
    """Attention, then a two-matrix ReLU network, each behind its LayerNorm."""

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, at: str, shard: Shard = WHOLE) -> None:
        hidden, wide, heads = config.hidden, config.intermediate, config.heads * config.head_dim
        self.qkv = _joined(weights, [f"{at}.self_attn.{p}_proj" for p in "qkv"], (heads, hidden), config.qkv_bias)
        self.out = shard.reduced(_joined(weights, [f"{at}.self_attn.out_proj"], (hidden, heads), config.output_bias))
        self.up = _joined(weights, [f"{at}.fc1"], (wide, hidden), config.mlp_bias)
        self.down = shard.reduced(_joined(weights, [f"{at}.fc2"], (hidden, wide), config.mlp_bias))
        self.attention_norm = LayerNorm(config, weights, f"{at}.self_attn_layer_norm")
        self.mlp_norm = LayerNorm(config, weights, f"{at}.final_layer_norm")
        self._ops, self._dim = ops, config.head_dim

    def __call__(self, x: Tensor, step: StepInput, kv: LayerKv) -> Tensor:
        tokens = x.shape[0]
        qkv = self.qkv(self.attention_norm(x)).view(tokens, -1, self._dim)
        attended = attention(self._ops, qkv, None, step, kv, self._dim**-0.5)
        x = x + self.out(attended.view(tokens, -1))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class LayerNorm:
    """y = (x - mean) / sqrt(var + eps) · weight + bias, over the last dimension."""

    def __init__(self, config: ModelConfig, weights: Weights, at: str) -> None:
        self.weight = weights.take(f"{at}.weight", (config.hidden,))
        self.bias = weights.take(f"{at}.bias", (config.hidden,))
        self._eps = config.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self._eps)


def _joined(weights: Weights, names: Sequence[str], shape: tuple[int, int], bias: bool) -> Linear:
    """The named matrices, each of ``shape``, stacked into one linear map."""
    return Linear(
        torch.cat([weights.take(f"{name}.weight", shape) for name in names]),
        torch.cat([weights.take(f"{name}.bias", shape[:1]) for name in names]) if bias else None,
    )
