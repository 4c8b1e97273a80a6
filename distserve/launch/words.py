"""The options of the commands that start processes, in words: help, choices, names; and a process's options as flags.

Fields and defaults are the dataclasses' own.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from distserve.controller.options import ControllerOptions
from distserve.gateway.options import GatewayOptions
from distserve.instance.options import InstanceOptions
from distserve.launch.options import CUDA_GRAPHS, DTYPES, KERNELS, KV_DTYPES, LEVELS, TRANSFERS, ServeOptions
from distserve.launch.settings import Setting, Words, settings_of

SERVERS: dict[str, Any] = {
    "serve": ServeOptions,
    "gateway": GatewayOptions,
    "controller": ControllerOptions,
    "instance": InstanceOptions,
}

HELPS: dict[str, str] = {
    "model": "a Hugging Face directory, a .gguf file, random:CONFIG.json, or an alias such as smollm2-135m",
    "model_name": "what clients call the model (serve: by default the alias or the directory's name)",
    "tokenizer": "directory of the tokenizer, where the model has none (random:CONFIG.json)",
    "dtype": "of weights and activations",
    "kv_cache_dtype": "of KV, if not --dtype's; fp8_e4m3: on a CPU, or a GPU of compute capability 8.9 or later",
    "device": "cpu, cuda, cuda:0, …",
    "kernels": "who computes: native (C++, compiled for this CPU at first use), triton (GPU), torch; auto: by device",
    "cuda_graphs": "on a GPU, decode steps recorded at the start and replayed in one launch (auto), or not (off)",
    "steps_in_flight": "steps planned before the last is done; auto: as many as stages, a GPU 2, a CPU 1",
    "kv_tokens": "size of an instance's KV pool, in tokens; auto (default): what memory holds and a batch can use",
    "kv_memory_fraction": "part of the memory free beside the weights that an auto pool takes; default: 0.5, GPU 0.9",
    "memory_bytes": "memory of this host for weights and KV; default: what is free (serve shares that out)",
    "memory_share": "part of each GPU that is this instance's, where instances share them",
    "block_size": "tokens in a block of KV",
    "max_model_len": "longest prompt and answer together, in tokens; default: the model's own",
    "transfer": "how KV moves between instances; auto: on one host ipc (GPU) or shared memory, else nccl (GPU) or gloo",
    "host": "address to listen on",
    "http_port": "port of the OpenAI-compatible HTTP API; 0: any; none: off",
    "grpc_port": "port of the gRPC API; 0: any; none: off",
    "api_keys": "file of clients' keys, hashed (`distserve key create`), read again when it changes; none: open to all",
    "open_metrics": "show /metrics to clients without a key, too",
    "public_tls_dir": "cert.pem and key.pem (or tls.crt, tls.key) for clients, where that is not --tls-dir's",
    "tls_dir": "cert.pem, key.pem and ca.pem (or tls.crt, tls.key, ca.crt), read again when they change",
    "tls_cert": "certificate of this process, PEM",
    "tls_key": "its key, PEM",
    "tls_ca": "CA of the other parts' certificates, PEM: the cluster's own; makes TLS between the parts mutual",
    "tls_name": "name that the other parts' certificates have; default: the address dialled",
    "cluster_secret_file": "file with the secret that the parts prove to each other (or DISTSERVE_CLUSTER_SECRET)",
    "insecure_public": "listen on a network without authentication; only where that network is closed by other means",
    "Limits.max_prompts": "prompts in one call",
    "Limits.max_requests": "answers in one call: prompts times n",
    "Limits.max_n": "answers to one prompt",
    "Limits.max_prompt_chars": "characters of one prompt",
    "Limits.max_prompt_tokens": "tokens of one prompt; 0: what model and instances hold",
    "Limits.max_stops": "stop texts",
    "Limits.max_stop_chars": "characters of a stop text",
    "Limits.max_logit_bias": "tokens in logit_bias",
    "Limits.max_timeout_s": "seconds that a client may give a request",
    "Limits.max_body_bytes": "bytes of an HTTP body",
    "Limits.max_message_bytes": "bytes of a gRPC request",
    "Limits.max_header_bytes": "bytes of HTTP headers or gRPC metadata",
    "Limits.header_timeout_s": "seconds a client may take for a TLS handshake (gRPC) or its headers (HTTP)",
    "Limits.body_timeout_s": "seconds a client may take for a body",
    "Limits.keep_alive_s": "seconds an idle HTTP connection is kept",
    "Limits.max_client_streams": "answers under way for one key (or, without keys, one address); 0: no limit",
    "Limits.max_client_connections": "HTTP connections of one address; 0: no limit",
    "Limits.max_connections": "connections to the HTTP port, and to the gRPC port",
    "Limits.max_connection_streams": "gRPC calls at once on one connection",
    "default_timeout_s": "seconds a request may take when its client set no deadline",
    "unread_limit_s": "a client that reads nothing for so many seconds is cut off",
    "canary": "call the cluster ready once a request of our own went through prefill, hand-off and decode",
    "canary_timeout_s": "seconds that request may take before it is tried again",
    "grace_s": "seconds that running requests have to finish after SIGTERM or Ctrl-C",
    "journal": "write every event with its effects, JSON lines (serve: a directory, one file a process)",
    "log_level": "least important entries to log",
    "ServeOptions.prefill": "instances that read prompts",
    "ServeOptions.decode": "instances that write answers",
    "ServeOptions.mixed": "instances that do both, with chunked prefill",
    "ServeOptions.threads_per_rank": "threads of one rank's forward pass; default: cores / ranks",
    "ServeOptions.pin": "keep each instance to cores of its own, where there are enough for all threads",
    "cores": "cores that steps and KV copies keep to, as 0,1; default: any",
    "tp": "tensor parallel: ranks that share each layer's heads",
    "pp": "pipeline parallel: stages of layers, each of --tp ranks",
    "prefill_tp": "--tp of prefill instances, if it differs",
    "prefill_pp": "--pp of prefill instances, if it differs",
    "decode_tp": "--tp of decode instances, if it differs",
    "decode_pp": "--pp of decode instances, if it differs",
    "rank_timeout_s": "seconds that one rank of an instance waits for another; then the instance ends",
    "ServeOptions.controller_port": "port of the controller's gRPC, for instances that join from elsewhere; 0: any",
    "ServeOptions.start_timeout_s": "seconds the cluster may take to become ready before serve gives up",
    "ServeOptions.restart": "start an instance again when it dies, as a fresh incarnation",
    "ServeOptions.print_ready": "print one JSON line with all ports and process ids once the cluster can decode",
    "id": "name of this process in the cluster",
    "controller": "HOST:PORT of the controller",
    "port": "gRPC port; 0: any",
    "advertise_host": "address that others reach this process at; default: --host",
    "advertise": "HOST:PORT that others dial instead of --advertise-host and --port, where a NAT or proxy leads here",
    "data_port": "port of the KV data plane; 0: any",
    "advertise_data": "HOST:PORT that others dial for KV instead of --advertise-host and --data-port",
    "step_timeout_s": "seconds one forward pass may take; an instance that hangs for longer ends; none: no limit",
    "ops_port": "HTTP port of /metrics, /livez and /readyz; 0: any; none: off",
    "InstanceOptions.role": "what the instance is sent, and how it forms batches",
    "InstanceOptions.threads": "threads of the forward pass",
    "GatewayOptions.model": "directory (or .gguf file) that the tokenizer and chat template are read from",
    "InstanceConfig.max_batch_tokens": "tokens of one step when nobody decodes",
    "InstanceConfig.max_mixed_tokens": "tokens of one step when prompts are chunked beside decodes",
    "InstanceConfig.batching": "how a step's tokens are chosen: chunked, or as two systems the planner compares with",
    "InstanceConfig.prefill_chunk": "the most of one prompt in one step; its KV leaves while the rest is read",
    "InstanceConfig.max_sequences": "sequences in a batch, incoming moves included",
    "InstanceConfig.max_waiting": "requests that may queue at an instance",
    "InstanceConfig.prefix_cache": "keep the KV of finished prompts for prompts that begin alike",
    "InstanceConfig.headroom_share": "share of the pool kept free for running sequences when granting room",
    "InstanceConfig.lease_s": "seconds after which a ticket without progress is worthless",
    "InstanceConfig.reserve_repeat_s": "seconds between two asks for the same ticket",
    "InstanceConfig.reserve_timeout_s": "seconds to wait for a ticket before the hand-off is given up",
    "InstanceConfig.commit_repeat_s": "seconds between two repeats of a commit",
    "InstanceConfig.commit_timeout_s": "seconds to wait for the answer to a commit",
    "InstanceConfig.move_attempts": "tries of a hand-off to one destination before the gateway is told",
    "InstanceConfig.tombstone_s": "seconds an ended move is remembered, for late messages",
    "InstanceConfig.deadline_slack_s": "seconds an instance waits beyond the gateway's deadline",
    "ClusterConfig.lease_s": "an instance silent for so many seconds is dead",
    "ClusterConfig.max_queued_tokens": "prompt tokens queued per instance beyond which requests are refused",
    "ClusterConfig.max_open_requests": "requests in the whole cluster beyond which more are refused",
    "ClusterConfig.retry_after_s": "seconds after which a refused client is told to try again",
    "ClusterConfig.local_prefill_tokens": "prompts up to so many tokens are read where they will be decoded; 0: off",
    "ClusterConfig.overflow_prefill_tokens": "so is any prompt while prefill queues are longer by so many; 0: off",
    "ClusterConfig.affinity_runs": "prefixes remembered per instance, to send like to like",
    "ClusterConfig.lost_memory": "departed instances that members are told of",
    "GatewayConfig.max_streams": "requests in flight at a gateway beyond which more are refused",
    "GatewayConfig.dispatch_timeout_s": "seconds without an answer from the controller before choosing without it",
    "GatewayConfig.patience_s": "seconds a request waits for an instance to exist",
    "GatewayConfig.retry_pause_s": "seconds between two attempts of a request",
    "GatewayConfig.max_attempts": "attempts of a request before its client is told",
    "GatewayConfig.abandon_repeat_s": "seconds between two repeats of an Abandon",
    "GatewayConfig.abandon_timeout_s": "seconds after which an unanswered Abandon is given up",
    "GatewayConfig.first_token_timeout_s": "seconds a first token may take before another attempt; 0: no limit",
}

WORDS = Words(
    helps=HELPS,
    choices={
        "dtype": DTYPES,
        "kv_cache_dtype": KV_DTYPES,
        "kernels": KERNELS,
        "cuda_graphs": CUDA_GRAPHS,
        "transfer": TRANSFERS,
        "log_level": LEVELS,
    },
    keys={
        "InstanceConfig.lease_s": "ticket-lease",
        "GatewayOptions.journal": "journal",
        "GatewayConfig.first_token_timeout_s": "first-token-timeout",
    },
    automatic=("kv_tokens", "steps_in_flight"),
    hidden={
        "ready_fd": "an inherited descriptor, set by whoever starts the process",
        "parent_fd": "an inherited descriptor, set by whoever starts the process",
        "ClusterConfig.version": "the software's own",
        "InstanceConfig.steps_in_flight": "follows from --steps-in-flight",
        "InstanceConfig.follow_up": "follows from --steps-in-flight",
        "cluster_secret": "from the environment only: a command line can be read by everybody",
        "control_tls": "follows from --controller-port",
        "Limits.default_timeout_s": "the gateway's own",
        "Limits.unread_limit_s": "the gateway's own",
    },
)

OTHER_KEYS = ("cache", "server", "api-key", "config", "cluster-secret")
"""Keys that some environment variables set and no server command takes."""


def settings(command: str) -> tuple[Setting, ...]:
    """The options of a command that starts processes."""
    return settings_of(SERVERS[command], WORDS)


def all_keys() -> tuple[str, ...]:
    """Keys of all commands: one file and one environment may serve them all."""
    return (*dict.fromkeys(s.key for command in SERVERS for s in settings(command)), *OTHER_KEYS)


def flags_of(command: str, options: Any) -> list[str]:
    """The flags that make a process with these options, those at their defaults left out."""
    flags: list[str] = []
    for setting in settings(command):
        value = attrgetter(setting.path)(options)
        if value == setting.default:
            continue
        if setting.is_switch:
            flags.append(setting.flag if value else f"--no-{setting.key}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
            flags += [setting.flag, text]
    return flags
