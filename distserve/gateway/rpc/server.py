"""The gRPC server of a gateway: every public service on one port.

Owns listening, channel settings and stopping. The event loop belongs to whoever starts it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from distserve.gateway.frontend import FrontEnd
from distserve.gateway.limits import Limits
from distserve.gateway.ports import port_unavailable
from distserve.gateway.rpc.admin import AdminServicer
from distserve.gateway.rpc.decoding import DecodingInterceptor
from distserve.gateway.rpc.health import HealthServicer
from distserve.gateway.rpc.inference import InferenceServicer
from distserve.gateway.rpc.oip import OipServicer
from distserve.oip.v2 import grpc_service_pb2, grpc_service_pb2_grpc
from distserve.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from distserve.wire.tls import Certificates

PUBLIC_SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
    grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


@dataclass(frozen=True, slots=True)
class GrpcConfig:
    """How the public gRPC server listens. Without ``certificates`` in plain HTTP/2."""

    limits: Limits = field(default_factory=Limits)
    certificates: Certificates | None = None
    min_ping_interval_s: float = 10.0  # clients that ping more often are cut off


class GrpcServer:
    """The public services on one port. Made by ``build_grpc_server``, inside the event loop."""

    def __init__(self, front_end: FrontEnd, config: GrpcConfig) -> None:
        self.port = 0
        self._certificates = config.certificates
        self._server = grpc.aio.server(interceptors=(DecodingInterceptor(front_end.refused),), options=_options(config))
        self._health = HealthServicer(PUBLIC_SERVICES, front_end.backend.ready)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(front_end), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(front_end), self._server)
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(OipServicer(front_end), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*PUBLIC_SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen and serve; port 0 picks a free one. Returns the port. Raises ``PortUnavailable``."""
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificates is None:
                self.port = self._server.add_insecure_port(where)
            else:
                credentials = self._certificates.server_credentials(mutual=False)
                self.port = self._server.add_secure_port(where, credentials)
        except (RuntimeError, OverflowError) as error:
            raise port_unavailable("gRPC", host, port, "it is in use, or the address is not ours") from error
        await self._server.start()
        return self.port

    def refresh_health(self) -> None:
        """Call when readiness may have changed, for those who watch it; checks ask anew each time."""
        self._health.refresh()

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, let running ones finish for up to ``grace_s``, cancel the rest. Idempotent."""
        self._health.leave()
        await self._server.stop(grace_s)


def build_grpc_server(front_end: FrontEnd, config: GrpcConfig | None = None) -> GrpcServer:
    """A server that has not been started. Must be called inside the event loop it will run on."""
    return GrpcServer(front_end, config or GrpcConfig())


def _options(config: GrpcConfig) -> list[tuple[str, int]]:
    limits = config.limits
    return [
        ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        ("grpc.max_concurrent_streams", limits.max_connection_streams),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", round(limits.header_timeout_s * 1000)),
        ("grpc.http2.min_ping_interval_without_data_ms", round(config.min_ping_interval_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
