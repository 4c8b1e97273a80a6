"""Who may ask: bearer keys, the same for HTTP and gRPC. Without keys everybody may.

A key file is looked at when somebody asks, once a second at most, and read again when it changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from distserve.core.types import Code
from distserve.gateway.backend import RequestFailed
from distserve.gateway.keys import BadKeys, Key, read_keys

log = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as far as it is known."""

    name: str = ""  # of the key; empty where there are no keys
    admin: bool = True
    max_streams: int = 0  # of the key's own; 0: the gateway's limit for clients
    address: str = ""  # without port

    @property
    def client(self) -> str:
        """Whose limits count: the key's, or the address's where there are no keys."""
        return f"key {self.name!r}" if self.name else self.address or "everybody"


class ApiKeys:
    """The keys a gateway takes: fixed ones, or those of a file as it stands now. A file without keys lets nobody in."""

    def __init__(
        self, keys: Iterable[str] = (), file: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Reads the file. Raises ``BadKeys``. ``keys`` given in clear are admin keys, for whoever embeds a gateway."""
        self._file = file
        self._clock = clock
        self._looked_at = clock()
        self._stamp = _stamp(file)
        self._keys = tuple(Key.of(f"key-{n}", key, admin=True) for n, key in enumerate(keys))
        if file is not None:
            self._keys = read_keys(file)
        self.needed = file is not None or bool(self._keys)

    def check(self, authorization: str, address: str = "") -> Caller:
        """``authorization`` is the header's value, "Bearer KEY". Raises ``RequestFailed`` UNAUTHENTICATED."""
        if not self.needed:
            return Caller(address=address)
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer" or not text:
            raise RequestFailed(Code.UNAUTHENTICATED, "No API key was sent; send one as 'Authorization: Bearer KEY'.")
        self._look()
        found = None
        for key in self._keys:  # all of them, so that the time taken tells nothing of which comes close
            if key.fits(text.strip()):
                found = key
        if found is None:
            raise RequestFailed(Code.UNAUTHENTICATED, "The API key is not known here; check it with the operator.")
        return Caller(found.name, found.admin, found.max_streams, address)

    def _look(self) -> None:
        if self._file is None or self._clock() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = self._clock()
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._file)
            log.info("the API keys were read again: %d", len(self._keys))
        except BadKeys as error:
            log.error("%s; the keys read before stay in force", error)


def require_admin(caller: Caller) -> None:
    """Raises ``RequestFailed`` PERMISSION_DENIED for a key that is not an operator's."""
    if not caller.admin:
        raise RequestFailed(
            Code.PERMISSION_DENIED,
            f"The API key '{caller.name}' may ask the model but not operate the cluster; use one that was made with "
            "`distserve key create --admin`.",
        )


def _stamp(file: Path | None) -> _Stamp | None:
    """Changes when the file is replaced, rewritten or gone."""
    try:
        about = file.stat() if file is not None else None
    except OSError:
        return None
    return (about.st_ino, about.st_size, about.st_mtime_ns) if about is not None else None
