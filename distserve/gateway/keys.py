"""Keys of clients, as they are kept: a line each in a file, hashed, so that the file gives no key away.

``NAME:sha256$SALT$HASH[:admin][,streams=N]``, salt and hash in hex, the hash over salt and key. A key is 256 random
bits, which no dictionary holds: one round of SHA-256 protects it as well as a slow hash, at no cost for each request.
``#`` begins a comment. Owns the form; knows nothing of who asks.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PREFIX = "dsk-"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_LINE = re.compile(r"([^:]+):sha256\$([0-9a-f]{16,64})\$([0-9a-f]{64})(?::([a-z0-9=,]*))?")


class BadKeys(ValueError):
    """A key file that cannot be read, or a name that cannot be used; the text is for the user."""


@dataclass(frozen=True, slots=True)
class Key:
    """One client's key. ``admin`` keys may use the admin service, too."""

    name: str
    salt: bytes
    digest: bytes
    admin: bool = False
    max_streams: int = 0  # answers under way at once; 0: the gateway's limit for clients

    @classmethod
    def of(cls, name: str, key: str, *, admin: bool = False, max_streams: int = 0) -> Key:
        """The key ``key`` as it is kept. Raises ``BadKeys`` for a name that a line cannot hold."""
        if not _NAME.fullmatch(name):
            raise BadKeys(f"{name!r} cannot name a key: use up to 64 letters, digits and ._@-")
        salt = secrets.token_bytes(16)
        return cls(name, salt, _digest(salt, key), admin, max_streams)

    @classmethod
    def parse(cls, line: str) -> Key:
        """A line of the file. Raises ``BadKeys``."""
        match = _LINE.fullmatch(line)
        if not match or not _NAME.fullmatch(match[1]) or len(match[2]) % 2:
            raise BadKeys("it is not NAME:sha256$SALT$HASH; make lines with `distserve key create`")
        admin, streams = False, 0
        for word in filter(None, (match[4] or "").split(",")):
            if word == "admin":
                admin = True
            elif re.fullmatch(r"streams=\d{1,9}", word):
                streams = int(word.removeprefix("streams="))
            else:
                raise BadKeys(f"{word!r} is not known; a key may be 'admin' or have 'streams=N'")
        return cls(match[1], bytes.fromhex(match[2]), bytes.fromhex(match[3]), admin, streams)

    def line(self) -> str:
        """As ``parse`` reads it."""
        words = ["admin"] * self.admin + ([f"streams={self.max_streams}"] if self.max_streams else [])
        suffix = ":" + ",".join(words) if words else ""
        return f"{self.name}:sha256${self.salt.hex()}${self.digest.hex()}{suffix}"

    def fits(self, key: str) -> bool:
        """Whether this is the key, in a time that does not tell how near it came."""
        return hmac.compare_digest(_digest(self.salt, key), self.digest)


def fresh_key() -> str:
    """A new key: 256 random bits, with a prefix that secret scanners can find."""
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> tuple[Key, ...]:
    """All keys of a file. Raises ``BadKeys`` with the line's number, or a name that is there twice."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BadKeys(f"cannot read the API keys {path}: {why}; make one with `distserve key create NAME`") from error
    found: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = Key.parse(line.strip())
        except BadKeys as error:
            raise BadKeys(f"line {number} of the API keys {path} cannot be read: {error}") from None
        if key.name in found:
            raise BadKeys(f"line {number} of the API keys {path}: there are two keys named {key.name!r}")
        found[key.name] = key
    return tuple(found.values())


def write_keys(path: Path, keys: Iterable[Key]) -> None:
    """Replace the file at one stroke, readable by its owner alone: a gateway never sees half of it."""
    text = "".join(key.line() + "\n" for key in keys)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode(errors="surrogateescape")).digest()
