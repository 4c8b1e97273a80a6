"""What a gateway accepts of its clients, whatever the model: sizes, counts, times. Knows no protocol."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit has its own answer, a status and a sentence: see the README's table. 0 turns off where it says so."""

    # of one request
    max_prompts: int = 256  # prompts in one call
    max_requests: int = 512  # prompts times n
    max_n: int = 16
    max_prompt_chars: int = 2_000_000  # before it is even tokenized
    max_prompt_tokens: int = 0  # 0: what the model and the instances hold
    max_stops: int = 16
    max_stop_chars: int = 512  # of each
    max_logit_bias: int = 4096  # biased tokens
    default_timeout_s: float = 600.0
    max_timeout_s: float = 3600.0
    # of one HTTP request or gRPC message
    max_body_bytes: int = 16 << 20
    max_message_bytes: int = 4 << 20
    max_header_bytes: int = 64 << 10  # HTTP request line and headers; gRPC metadata
    header_timeout_s: float = 10.0  # from the first byte (or the connection) to the end of the headers
    body_timeout_s: float = 60.0  # from there to the end of the body
    keep_alive_s: float = 75.0  # between two HTTP requests
    unread_limit_s: float = 60.0  # an HTTP client that takes nothing of its answer for so long is hung up on
    # of clients: whoever shares a key, or, where there are no keys, an address
    max_client_streams: int = 1024  # answers under way; 0: no limit
    max_client_connections: int = 1024  # of HTTP, by address; 0: no limit
    max_connections: int = 8192  # of HTTP and of gRPC, each
    max_connection_streams: int = 1024  # gRPC calls at once on one connection
