"""Whom a process believes on its control connections, and what it shows of itself: certificates, a secret, or nothing.

Owns how both become gRPC channels, ports and metadata. Knows no machine and no stream.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from distserve.wire.secret import ANSWER_KEY, PROOF_KEY, ClusterSecret, Proof, SecretRefused
from distserve.wire.security import SecurityOptions
from distserve.wire.tls import Certificates, explained

Options = Sequence[tuple[str, Any]]
Metadata = tuple[tuple[str, str | bytes], ...]
HELLO_KEY = "distserve-hello-bin"
_PACKAGE = "distserve.v1"


@dataclass(frozen=True, slots=True)
class Trust:
    """See the module. With neither, everybody who reaches a port is believed."""

    certificates: Certificates | None = None
    name: str = ""  # that the other side's certificate must have; empty: the address dialled
    secret: ClusterSecret | None = None

    @classmethod
    def of(cls, options: SecurityOptions) -> Trust:
        """Reads the files. Raises ``Unsafe``. Certificates without a CA are for clients and say nothing here."""
        files = options.tls
        certificates = Certificates(files) if files is not None and options.mutual_tls else None
        return cls(certificates, options.tls_name, ClusterSecret.of(options))

    # ── dialling ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def channel(self, address: str, options: Options) -> grpc.aio.Channel:
        """A channel to ``address`` with the certificate of now. The caller closes it."""
        if self.certificates is None:
            return grpc.aio.insecure_channel(address, options=options)
        named: Options = [*options, ("grpc.ssl_target_name_override", self.name)] if self.name else options
        return grpc.aio.secure_channel(address, self.certificates.channel_credentials(), options=named)

    def prove(self, path: str, metadata: Metadata = ()) -> tuple[Metadata, Proof | None]:
        """The metadata of a call with the proof that it needs, and what to check its answer by."""
        if self.secret is None:
            return metadata, None
        proof = self.secret.prove(path, _hello(metadata))
        return (*metadata, (PROOF_KEY, proof.text)), proof

    def is_answered(self, proof: Proof | None, metadata: Any) -> bool:
        """Whether the callee showed that it knows the secret, in its initial metadata."""
        if self.secret is None or proof is None:
            return True
        return any(self.secret.is_answer(proof, value) for key, value in metadata or () if key == ANSWER_KEY)

    def explained(self, details: str, address: str) -> str:
        """Why a connection did not come to be, for a log."""
        return explained(details, address, self.certificates)

    # ── serving ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def interceptors(self) -> list[grpc.aio.ServerInterceptor[Any, Any]]:
        """What a control server is built with."""
        return [_Gate(self.secret)] if self.secret is not None else []

    def add_port(self, server: grpc.aio.Server, where: str) -> int:
        """Have the server listen; as ``add_insecure_port``."""
        if self.certificates is None:
            return server.add_insecure_port(where)
        return server.add_secure_port(where, self.certificates.server_credentials(mutual=True))

    def answer(self, context: Any) -> Metadata:
        """What an accepted stream says besides: that we know the secret, too."""
        if self.secret is None:
            return ()
        metadata = context.invocation_metadata() or ()
        proof = next((value for key, value in metadata if key == PROOF_KEY), "")
        return ((ANSWER_KEY, self.secret.answer(proof)),)


OPEN = Trust()


def method_path(service: Any, method: str) -> str:
    """ "/distserve.v1.Service/Method" of a generated stub or servicer class."""
    name = service.__name__.removesuffix("Stub").removesuffix("Servicer")
    return f"/{_PACKAGE}.{name}/{method}"


def _hello(metadata: Any) -> bytes:
    found = [value for key, value in metadata or () if key == HELLO_KEY]
    return found[0] if len(found) == 1 and isinstance(found[0], bytes) else b""


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Lets no call in that does not prove the secret; before a byte of it is read."""

    def __init__(self, secret: ClusterSecret) -> None:
        self._secret = secret

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        metadata: Any = handler_call_details.invocation_metadata
        proofs = [value for key, value in metadata or () if key == PROOF_KEY]
        try:
            self._secret.check(handler_call_details.method, _hello(metadata), proofs)
        except SecretRefused as error:
            return _refusing(handler, str(error))
        return handler


def _refusing(handler: grpc.RpcMethodHandler[Any, Any] | None, why: str) -> Any:
    """A handler of the same shape that says why not."""

    async def refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

    shapes = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    shape = (bool(handler.request_streaming), bool(handler.response_streaming)) if handler else (True, True)
    make: Any = shapes[shape]
    return make(refuse)
