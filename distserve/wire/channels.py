"""How control connections are made: channel and server settings, the hello that opens a stream, pauses between dials.

Knows gRPC, no machine. Settings follow what was proved of grpcio: a keepalive needs the server's consent, the receive
limit must exceed the longest prompt, and a port that two processes share is an error.
"""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from distserve.core.types import Endpoint, GatewayRef, InstanceRef
from distserve.v1 import control_pb2
from distserve.wire.convert import WireError, from_message, to_message
from distserve.wire.trust import HELLO_KEY, OPEN, Trust

PROTOCOL = 1
"""Version of the control protocol. Raised when a message changes its meaning; added fields do not."""

ACCEPTED_KEY = "distserve-accepted"
WILDCARDS = ("0.0.0.0", "::", "")
MAX_MESSAGE_BYTES = 16 << 20
KEEPALIVE_MS = 5_000  # a way that swallows everything is found out in ten seconds, as silence at the controller is
KEEPALIVE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_S = 3.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0

_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.bdp_probe", 0),  # its ping, unanswered, keeps the keepalive's from being sent: silence for a minute
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 4),
    ("grpc.so_reuseport", 0),  # a port that another process holds is an error, not a share
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.use_local_subchannel_pool", 1),  # a link of its own: a fresh dial must not inherit another's backoff
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 3000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)


class HelloRefused(Exception):
    """A stream was opened by someone it cannot be opened by. The text is the sentence for the status."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who opens a control stream, the life it believes it dials, and where it can be dialled itself."""

    sender: InstanceRef | GatewayRef
    to: InstanceRef | None = None
    endpoint: Endpoint | None = None

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        """As the metadata of a call."""
        party = "instance" if isinstance(self.sender, InstanceRef) else "gateway"
        message = control_pb2.Hello(protocol=PROTOCOL)
        getattr(message, party).MergeFrom(to_message(self.sender))
        if self.to is not None:
            message.to.MergeFrom(to_message(self.to))
        if self.endpoint is not None:
            message.endpoint.MergeFrom(to_message(self.endpoint))
        return ((HELLO_KEY, message.SerializeToString()),)


def read_hello(metadata: Any, me: InstanceRef | None) -> Hello:
    """The hello of an incoming call to ``me`` (None: the controller). Raises ``HelloRefused``."""
    found = [value for key, value in metadata or () if key == HELLO_KEY]
    if len(found) != 1:
        raise HelloRefused(f"the stream does not say who opens it: {HELLO_KEY} is needed once")
    try:
        message = control_pb2.Hello.FromString(found[0])
        hello = _hello(message)
    except (DecodeError, WireError) as error:
        raise HelloRefused(f"the hello of the stream cannot be read: {error}") from error
    if message.protocol != PROTOCOL:
        raise HelloRefused(
            f"{hello.sender} speaks control protocol {message.protocol}, here it is {PROTOCOL}: "
            "run the same version of distserve everywhere"
        )
    if me is not None and hello.to != me:
        raise HelloRefused(f"{hello.sender} dialled {hello.to or 'nobody'}, here is {me}")
    return hello


def _hello(message: control_pb2.Hello) -> Hello:
    match message.WhichOneof("sender"):
        case "instance":
            sender: InstanceRef | GatewayRef = from_message(InstanceRef, message.instance)
        case "gateway":
            sender = from_message(GatewayRef, message.gateway)
        case _:
            raise WireError("the sender is missing")
    to = from_message(InstanceRef, message.to) if message.HasField("to") else None
    endpoint = from_message(Endpoint, message.endpoint) if message.HasField("endpoint") else None
    return Hello(sender, to, endpoint)


def dial(address: str, trust: Trust = OPEN) -> grpc.aio.Channel:
    """A channel to a control address. The caller closes it."""
    return trust.channel(address, CHANNEL_OPTIONS)


class PortTaken(RuntimeError):
    """The address cannot be bound."""


def address_of(host: str, port: int) -> str:
    """``host:port``, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_host(bound: str, towards: str) -> str:
    """The address others reach us at when we listen on ``bound``: for a wildcard, the one that faces ``towards``.

    ``towards`` is a host:port. Raises ``ValueError`` with a sentence when there is no way there.
    """
    if bound not in WILDCARDS:
        return bound
    host, _, port = towards.rpartition(":")
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            facing: str = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"cannot tell which of our addresses faces the controller at {towards} ({error.strerror or error}); "
            "name it with --advertise-host"
        ) from error
    return facing


def bind(host: str, port: int, trust: Trust = OPEN) -> tuple[grpc.aio.Server, int]:
    """A control server with its port (0: any) bound but not yet started. Raises ``PortTaken`` with a sentence."""
    server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=trust.interceptors())
    try:
        bound = trust.add_port(server, address_of(host, port))
    except RuntimeError:
        bound = 0
    if bound == 0:
        where = address_of(host, port)
        raise PortTaken(f"cannot listen on {where}: is another process using that port? Choose another")
    return server, bound


class Backoff:
    """Growing pauses between dials, each with jitter so that many do not dial as one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._next_s = FIRST_PAUSE_S

    def reset(self) -> None:
        """A dial went well."""
        self._next_s = FIRST_PAUSE_S

    def pause_s(self) -> float:
        """How long to wait before the next dial: between half and all of a doubling time."""
        pause = self._next_s * self._random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, LONGEST_PAUSE_S)
        return pause


def sentence(error: grpc.RpcError | BaseException) -> str:
    """What went wrong with a call, for a log or an event's ``why``."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
