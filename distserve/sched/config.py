"""Settings of the three machines. Frozen; durations in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from distserve.sched.batching import BatchPolicy


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """Limits and deadlines of one instance."""

    max_batch_tokens: int = 2048  # tokens of one step when nobody decodes
    max_mixed_tokens: int = 512  # tokens of one step when prompts are chunked beside decodes
    prefill_chunk: int = 512  # the most of one prompt in one step, so that its KV leaves while it is prefilled
    max_sequences: int = 64  # sequences in the running set, incoming moves included
    max_waiting: int = 1024
    steps_in_flight: int = 1  # asked for and not yet answered; above 1 the next is planned before the last is done
    follow_up: bool = False  # plan the token after one that an outstanding step samples; else such steps are disjoint
    batching: BatchPolicy = BatchPolicy.CHUNKED
    prefix_cache: bool = True
    headroom_share: float = 0.02  # of the pool, kept free for running sequences when granting or admitting
    lease_s: float = 10.0  # a ticket without progress is worthless after this
    reserve_repeat_s: float = 2.0  # a source repeats its ask (and so renews the lease) this often
    reserve_timeout_s: float = 60.0
    commit_repeat_s: float = 1.0
    commit_timeout_s: float = 10.0
    move_attempts: int = 3  # to the same destination, before the gateway is told
    tombstone_s: float = 60.0  # how long an ended move or abandoned request is remembered
    deadline_slack_s: float = 2.0  # the gateway's deadline acts first; the instance's is the net under it


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Limits and deadlines of the controller."""

    lease_s: float = 10.0  # an instance silent this long is dead
    version: str = ""  # wire version that instances must speak; empty: any
    max_queued_tokens: int = (
        262_144  # predicted prompt tokens queued per prefill-able instance before requests are refused
    )
    max_open_requests: int = 2048
    retry_after_s: float = 1.0
    local_prefill_tokens: int = (
        0  # conditional disaggregation: prompts up to this are prefilled where they decode; 0: off
    )
    overflow_prefill_tokens: int = 0  # likewise any prompt, while prefill is behind decode by more; 0: off
    affinity_runs: int = 4096  # prefix runs remembered per instance
    lost_memory: int = 32  # how many departed lives are named in MembersChanged


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Limits and deadlines of a gateway."""

    max_streams: int = 4096
    dispatch_timeout_s: float = 2.0  # without an answer from the controller, dispatch in bypass
    patience_s: float = 30.0  # how long a request waits for an instance to exist
    retry_pause_s: float = 0.2
    max_attempts: int = 10
    abandon_repeat_s: float = 1.0
    abandon_timeout_s: float = 30.0
    first_token_timeout_s: float = 0.0  # 0: only the request's own deadline
