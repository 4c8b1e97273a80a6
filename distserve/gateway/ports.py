"""Listening sockets, and a sentence when one cannot be had."""

from __future__ import annotations

import errno
import socket


class PortUnavailable(Exception):
    """The address cannot be listened on; the message says which and what to do."""


def port_unavailable(what: str, host: str, port: int, reason: str) -> PortUnavailable:
    """``what`` names the server, such as "HTTP"; its option is ``--<what>-port``."""
    option = f"--{what.lower()}-port"
    return PortUnavailable(
        f"The {what} server cannot listen on {host}:{port} ({reason}); stop whoever uses that port, or choose another "
        f"with {option} (0 picks a free one)."
    )


def listen(what: str, host: str, port: int) -> socket.socket:
    """A bound, listening, non-blocking TCP socket; port 0 picks a free one. Raises ``PortUnavailable``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
        sock.setblocking(False)
    except (OSError, OverflowError) as error:
        sock.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise port_unavailable(what, host, port, "it is in use" if in_use else str(error)) from error
    return sock
