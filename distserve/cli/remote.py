"""A gateway's gRPC services as the commands use them: a channel, who we are, and errors as sentences."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from distserve.cli.failure import CommandFailed
from distserve.v1.admin_pb2_grpc import AdminServiceStub
from distserve.v1.inference_pb2_grpc import InferenceServiceStub

CONNECT_S = 5.0
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0))


@dataclass(frozen=True, slots=True)
class Remote:
    """A connected gateway."""

    inference: Any  # InferenceServiceStub
    admin: Any  # AdminServiceStub
    metadata: tuple[tuple[str, str], ...]
    timeout_s: float

    @property
    def call(self) -> dict[str, Any]:
        """What every call is made with."""
        return {"timeout": self.timeout_s, "metadata": self.metadata}


@contextmanager
def remote(parsed: argparse.Namespace) -> Iterator[Remote]:
    """The gateway that ``--server`` names. Whatever a call in the block fails with becomes ``CommandFailed``."""
    metadata = (("authorization", f"Bearer {parsed.api_key}"),) if parsed.api_key else ()
    with _channel(parsed) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=min(CONNECT_S, parsed.timeout))
        except grpc.FutureTimeoutError:
            raise CommandFailed(
                f"no gateway answers at {parsed.server}; start one with `distserve serve`, or say --server HOST:PORT"
                + (f" (we spoke TLS and trusted {parsed.tls_ca})" if parsed.tls_ca else " (TLS? say --tls-ca FILE)")
            ) from None
        try:
            yield Remote(InferenceServiceStub(channel), AdminServiceStub(channel), metadata, parsed.timeout)
        except grpc.RpcError as error:
            raise CommandFailed(_words(error)) from error


def _channel(parsed: argparse.Namespace) -> grpc.Channel:
    if not parsed.tls_ca:
        return grpc.insecure_channel(parsed.server, options=_OPTIONS)
    try:
        ca = Path(parsed.tls_ca).read_bytes() if parsed.tls_ca != "system" else None
    except OSError as error:
        raise CommandFailed(f"cannot read the CA {parsed.tls_ca}: {error.strerror}") from error
    return grpc.secure_channel(parsed.server, grpc.ssl_channel_credentials(ca), options=_OPTIONS)


def _words(error: grpc.RpcError) -> str:
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    if code is None or details is None:
        return str(error)
    return str(details() or code().name.lower().replace("_", " "))
