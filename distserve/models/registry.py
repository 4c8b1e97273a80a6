"""Which class runs which architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from distserve.models.config import ModelConfig
from distserve.models.llama import Llama
from distserve.models.opt import Opt
from distserve.models.step import StepInput
from distserve.models.weights import Weights
from distserve_kernels.ops import Ops
from distserve_kernels.paged import LayerKv

Model = Callable[[StepInput, Sequence[LayerKv]], Tensor | None]
"""A loaded model: a step and the layers' KV in, logits [sampled, vocab] out (None when nothing is sampled)."""

BUILDERS: dict[str, Callable[[ModelConfig, Weights, Ops, int], Model]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "OPTForCausalLM": Opt,
}
