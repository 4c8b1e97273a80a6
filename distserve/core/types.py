"""The nouns of the cluster: requests, instances, steps, tickets. Frozen values; they hold no behaviour that changes.

Words are those of DESIGN §2. Token ids are plain ints, positions count from 0, every duration is in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

EPOCH_STRIDE = 1 << 16
"""Epochs of one request: a gateway's attempt n starts at n * EPOCH_STRIDE; every committed move adds 1."""


def first_epoch(attempt: int) -> int:
    """The epoch at which the gateway's ``attempt`` (1, 2, …) starts."""
    return attempt * EPOCH_STRIDE


def attempt_of(epoch: int) -> int:
    """The gateway's attempt that an epoch belongs to."""
    return epoch // EPOCH_STRIDE


class Role(StrEnum):
    """What an instance is sent and how it forms batches: policy, never another code path."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def can_prefill(self) -> bool:
        return self is not Role.DECODE

    @property
    def can_decode(self) -> bool:
        return self is not Role.PREFILL


class Placement(StrEnum):
    """Why an attempt was dispatched as it was: who reads its prompt, seen from who writes its answer."""

    DISAGGREGATED = "disaggregated"  # a prefill instance, which hands it off
    COLOCATED = "colocated"  # the same, a mixed instance
    LOCAL = "local"  # the same, a decode instance, because the prompt is short
    OVERFLOW = "overflow"  # the same, a decode instance, because every prefill queue is long


class FinishReason(StrEnum):
    """Why a sequence ended where it ran. Stop *strings* are matched by the gateway, which then cancels."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Code(StrEnum):
    """Error kinds; one table (``distserve.wire.status``) maps them to gRPC and HTTP."""

    INVALID_ARGUMENT = "invalid_argument"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True, order=True)
class InstanceRef:
    """One life of one instance. Nothing is keyed by host:port or by id alone."""

    id: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.id}#{self.incarnation}"


@dataclass(frozen=True, slots=True, order=True)
class GatewayRef:
    """One life of one gateway."""

    id: str
    incarnation: int

    def __str__(self) -> str:
        return f"{self.id}#{self.incarnation}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. ``temperature == 0`` is greedy.

    ``seed`` is always set (the gateway draws one when the client gave none): token *i* of a request is a function of
    (logits, seed, i) alone, so the result depends on neither batch mates nor the instance that computes it.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off; over prompt and output
    presence_penalty: float = 0.0  # over output only
    frequency_penalty: float = 0.0  # over output only
    seed: int = 0  # 0 <= seed < 2**64
    logprobs: int = -1  # -1: none; 0: the chosen token's; n: also the n most likely
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def needs_history(self) -> bool:
        """True when the choice of a token depends on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends. ``max_tokens`` is already capped to the model's and the pool's length by the gateway."""

    max_tokens: int
    min_tokens: int = 0  # stop and EOS tokens are not sampled before this many output tokens
    stop_token_ids: tuple[int, ...] = ()  # EOS ids are added by the gateway unless ignore_eos


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked; immutable. ``timeout_s`` counts from its arrival at the gateway."""

    id: str
    model: str
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    timeout_s: float
    priority: int = 0  # higher is more urgent
    tenant: str = ""
    slo_class: str = ""
    trace: str = ""  # W3C traceparent, carried along untouched

    @property
    def total_tokens(self) -> int:
        """The most tokens this request can come to hold: prompt and all output."""
        return len(self.prompt_token_ids) + self.stopping.max_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token. ``top`` holds (token id, logprob), most likely first, when asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the parts of the cluster need to know of the model and how its KV is laid out.

    ``fingerprint`` digests architecture, weights and the KV layout's meaning (not block size): two instances may
    exchange KV only if theirs are equal.
    """

    name: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    layers: int
    kv_heads: int
    head_dim: int
    kv_dtype: str  # "float32" | "bfloat16" | "float16" | "fp8_e4m3"
    block_size: int  # tokens a block, local to the instance
    pool_blocks: int

    @property
    def pool_tokens(self) -> int:
        return self.block_size * self.pool_blocks

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence this instance can run alone."""
        return min(self.max_model_len, self.pool_tokens)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one life of an instance can be reached: ``address`` for gRPC, ``data_address`` for the data plane."""

    ref: InstanceRef
    address: str
    data_address: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """An instance as the cluster knows it."""

    endpoint: Endpoint
    role: Role
    spec: ModelSpec
    version: str = ""

    @property
    def ref(self) -> InstanceRef:
        return self.endpoint.ref


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CHOSEN_BEFORE = -1
"""Stands for a token that a step before this one samples, and that nobody knew when this one was planned."""


@dataclass(frozen=True, slots=True)
class StepItem:
    """Compute these tokens of this sequence, from this position, into these blocks.

    A prompt chunk, a resumed prompt and a next token are the same item. ``blocks`` covers positions
    ``0 .. start + len(token_ids)``; the KV of positions ``< start`` is already in it, or the steps before this one that
    are still outstanding write it.

    ``token_ids == (CHOSEN_BEFORE,)``: the item *follows*. Its token is the one that the last step before it which
    sampled for this request has chosen; that step is outstanding, or was the last one done.
    """

    request_id: str
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    sample: bool  # whether the last position's logits choose a next token
    output_index: int = 0  # index, among the request's output tokens, of the token to be sampled
    sampling: Sampling = field(default_factory=Sampling)
    banned: tuple[int, ...] = ()  # token ids that may not be sampled now (min_tokens)
    prompt: tuple[int, ...] = ()  # only when sampling.needs_history
    output: tuple[int, ...] = ()  # output tokens so far, only when sampling.needs_history

    @property
    def follows(self) -> bool:
        """Whether its one token is what a step before samples (``CHOSEN_BEFORE``)."""
        return self.token_ids == (CHOSEN_BEFORE,)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass. ``number`` counts the instance's steps from 1; plans are computed in this order."""

    number: int
    items: tuple[StepItem, ...]

    @property
    def tokens(self) -> int:
        return sum(len(i.token_ids) for i in self.items)


@dataclass(frozen=True, slots=True)
class Load:
    """What an instance reports of itself. Token counts; ``kv_*`` in blocks of this instance."""

    waiting: int = 0  # sequences not yet started
    running: int = 0  # sequences in the running set
    handing_off: int = 0  # prefilled here, waiting for or under a move out
    incoming: int = 0  # moves that arrive here
    queued_tokens: int = 0  # prompt tokens owed before any new request would start
    kv_free: int = 0
    kv_cached: int = 0  # free for the taking: prefix-cached, held by nobody
    kv_total: int = 0
    steps: int = 0
    preemptions: int = 0


# ── moves ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ticket:
    """A destination's one-use grant to write one sequence's KV (DESIGN §5).

    Bound to the move, the request and epoch, both incarnations, the model fingerprint and a nonce; worthless after
    ``lease_s`` without progress. ``have_tokens`` of the prefix are already at the destination and are not sent.
    """

    move_id: str
    request_id: str
    epoch: int
    source: InstanceRef
    destination: InstanceRef
    fingerprint: str
    nonce: int
    have_tokens: int
    total_tokens: int  # KV positions the grant has room for
    lease_s: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, each part measured by the process that spent it (DESIGN §8). Seconds.

    ``gateway + dispatch + queue + prefill`` sum to TTFT; ``reserve + transfer + decode_queue + decode_step`` sum to the
    gap before the second token. ``gateway`` and ``transfer`` are what the gateway's clock saw beyond the other parts:
    tokenizing and the network; the last stages, the commit and the network.
    """

    gateway_s: float = 0.0
    dispatch_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    reserve_s: float = 0.0
    transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    decode_step_s: float = 0.0
    kv_bytes_moved: int = 0
    cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
