"""Which class runs which architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from distserve.models.config import ModelConfig
from distserve.models.llama import Llama
from distserve.models.opt import Opt
from distserve.models.shard import Shard
from distserve.models.step import StepInput
from distserve.models.weights import Weights
from distserve_kernels.ops import Ops
from distserve_kernels.paged import LayerKv


class Model(Protocol):
    """A loaded model, or one rank's share of it: a step and its layers' KV in, logits [sampled, vocab] out (None when
    nothing is sampled). Stages hand each other [tokens, hidden], see ``models.shard``. A layer's KV is taken when the
    model comes to that layer: whoever hands it out may end the step there, by an exception.
    """

    def __call__(self, step: StepInput, kv: Iterable[LayerKv], before: Tensor | None = None) -> Tensor | None: ...


BUILDERS: dict[str, Callable[[ModelConfig, Weights, Ops, int, Shard], Model]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "Qwen2ForCausalLM": Llama,
    "Qwen3ForCausalLM": Llama,
    "OPTForCausalLM": Opt,
}
