"""Certificates that may be replaced while they are used: read again when the files change, kept when they are broken.

Nobody watches the files. Whoever needs a certificate (a handshake that begins, a channel that is dialled) asks for the
present one, and the files are looked at then, once a second at most. Connections that stand keep the certificate they
began with.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from distserve.wire.security import TlsFiles, Unsafe

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
READ_TRIES = 3

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Material:
    """What the files held at one time. ``context`` is a server's, with this certificate, asking for none back."""

    cert: bytes
    key: bytes = field(repr=False)
    ca: bytes | None
    context: ssl.SSLContext


class Certificates:
    """One set of files, read when needed. Thread-safe: gRPC asks from threads of its own."""

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the files. Raises ``Unsafe`` with a sentence when they are no certificate and key."""
        self.files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._material = _read(files)
        self._looked_at = clock()
        self._complaint = ""

    def current(self) -> Material:
        """The certificate of now; the former one as long as the files are broken."""
        with self._lock:
            if self._clock() - self._looked_at >= LOOK_EVERY_S:
                self._looked_at = self._clock()
                self._look()
            return self._material

    def _look(self) -> None:
        try:
            stamp = _stamp(self.files)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            self._material = _read(self.files)
        except Unsafe as error:
            if str(error) != self._complaint:
                log.error("%s; the certificate read before stays in use", error)
            self._complaint = str(error)
            return
        self._complaint = ""
        log.info("the certificate %s was replaced; new connections use the new one", self.files.cert)

    # ── as gRPC and asyncio take it ──────────────────────────────────────────────────────────────────────────────────

    def server_credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """Of a gRPC server. ``mutual``: callers must show a certificate of our CA."""

        def configuration() -> grpc.ServerCertificateConfiguration:
            now = self.current()
            return grpc.ssl_server_certificate_configuration([(now.key, now.cert)], now.ca if mutual else None)

        return grpc.dynamic_ssl_server_credentials(configuration(), configuration, require_client_authentication=mutual)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Of a gRPC channel dialled now: the other side must have a certificate of our CA, and is shown ours."""
        now = self.current()
        return grpc.ssl_channel_credentials(now.ca, now.key, now.cert)

    def server_context(self) -> ssl.SSLContext:
        """Of an asyncio server: each handshake takes the certificate of its own time."""

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self.current().context

        listening = _context(self.files)
        listening.sni_callback = renew  # called in every handshake, whether a name is sent or not
        return listening


def _stamp(files: TlsFiles) -> _Stamp:
    """Tells whether files were replaced: also by a swap of symbolic links, as Kubernetes does it."""
    found = []
    for path in (files.cert, files.key, files.ca):
        if path is not None:
            try:
                about = path.stat()
            except OSError as error:
                raise Unsafe(f"cannot read {path} for TLS: {error.strerror or error}") from error
            found.append((about.st_ino, about.st_size, about.st_mtime_ns))
    return tuple(found)


def _read(files: TlsFiles) -> Material:
    """All files as of one moment. Raises ``Unsafe``."""
    for _ in range(READ_TRIES):
        before = _stamp(files)
        context = _context(files)
        try:
            parts = [path.read_bytes() if path is not None else None for path in (files.cert, files.key, files.ca)]
        except OSError as error:
            raise Unsafe(f"cannot read {error.filename} for TLS: {error.strerror or error}") from error
        if before == _stamp(files):
            cert, key, ca = parts
            assert cert is not None and key is not None
            return Material(cert, key, ca, context)
    raise Unsafe(f"the certificate {files.cert} changes faster than it can be read")


def _context(files: TlsFiles) -> ssl.SSLContext:
    """A server's context, which also tells whether the files are any good. Raises ``Unsafe``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise Unsafe(f"{files.cert} and {files.key} are no certificate with its key: {why}") from error
    if files.ca is not None:
        _check_ca(files.ca)
    return context


def _check_ca(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise Unsafe(f"{path} holds no CA certificate: {getattr(error, 'reason', None) or error}") from error


def explained(details: str, address: str, certificates: Certificates | None) -> str:
    """What gRPC says of a connection that did not come to be, as a sentence that names the side which refused."""
    if "CERTIFICATE_VERIFY_FAILED" in details:
        ca = certificates.files.ca if certificates is not None else "our CA"
        return f"we refused the certificate of {address}: it is not signed by {ca}, or has run out"
    if "Hostname Verification" in details:
        return (
            f"we refused the certificate of {address}: it is not made out to that name; give it the name, or name the "
            "one it has with --tls-name"
        )
    if "WRONG_VERSION_NUMBER" in details:
        return f"{address} speaks no TLS, and we are to speak it: give both sides --tls-dir, or neither"
    if "failed to connect" in details and ("Socket closed" in details or "Handshake read failed" in details):
        if certificates is None:
            return f"{address} hung up on us without a word: does it want TLS? Give both sides --tls-dir, or neither"
        return (
            f"{address} refused us in the TLS handshake: is our certificate {certificates.files.cert} signed by the CA "
            "that it trusts?"
        )
    return details
