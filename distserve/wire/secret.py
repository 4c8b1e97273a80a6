"""The cluster's secret: how a caller shows that it knows it without saying it, and the callee as well.

Every control call carries a proof: time, a nonce, and an HMAC-SHA256 over both, the method and the hello. A proof is
taken once, and for a minute. The callee answers with an HMAC over the same nonce: nobody poses as the controller.
This authenticates; it hides nothing. Knows no gRPC.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distserve.wire.security import SecurityOptions, Unsafe

PROOF_KEY, ANSWER_KEY = "distserve-proof", "distserve-answer"
WINDOW_S = 60.0
LEAST_CHARS = 16
_VERSION = "1"
_CALLER, _CALLEE = b"distserve control caller", b"distserve control callee"


class SecretRefused(Exception):
    """A proof that does not hold. The text is the sentence for the status."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What a caller sends, and what it needs to check the answer."""

    text: str
    nonce: str


class ClusterSecret:
    """The secrets of this cluster: the first proves, each is accepted, so that one can be replaced by two restarts.

    Lives on one thread, but for ``derive``.
    """

    def __init__(self, known: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        """Raises ``Unsafe`` when there is none, or one that could be guessed."""
        self._keys = tuple(each.encode() for each in known)
        self._clock = clock
        self._seen: set[str] = set()
        self._ages: deque[tuple[float, str]] = deque()
        if not self._keys or min(map(len, self._keys)) < LEAST_CHARS:
            raise Unsafe(
                f"a cluster secret has at least {LEAST_CHARS} characters; make one with `distserve key secret FILE`"
            )

    @classmethod
    def of(cls, options: SecurityOptions) -> ClusterSecret | None:
        """From the file (a secret a line) or else the environment; None when neither is given. Raises ``Unsafe``."""
        if options.cluster_secret_file is not None:
            return cls(_lines(options.cluster_secret_file))
        return cls([options.cluster_secret]) if options.cluster_secret else None

    def derive(self, purpose: str) -> tuple[bytes, ...]:
        """Keys for something else, one for each secret, that tell nothing of it."""
        return tuple(hmac.digest(key, f"distserve {purpose}".encode(), "sha256") for key in self._keys)

    # ── caller ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def prove(self, path: str, hello: bytes) -> Proof:
        """A proof for one call of ``path`` ("/package.Service/Method") with this hello."""
        nonce, at = secrets.token_hex(16), str(round(self._clock() * 1000))
        mac = _mac(self._keys[0], _CALLER, path, at, nonce, hello)
        return Proof(f"{_VERSION} {at} {nonce} {mac}", nonce)

    def is_answer(self, proof: Proof, answer: str) -> bool:
        """Whether the callee knows the secret, too."""
        said, own = answer.encode().split(b" "), _answer(self._keys[0], proof.nonce).encode()
        return sum(hmac.compare_digest(own, each) for each in said) > 0

    # ── callee ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def check(self, path: str, hello: bytes, proofs: Sequence[str]) -> None:
        """Take the proof of an incoming call. Raises ``SecretRefused``."""
        if len(proofs) != 1:
            raise SecretRefused(
                "this cluster has a secret and the caller showed none: give it the same --cluster-secret-file "
                "(or DISTSERVE_CLUSTER_SECRET)"
            )
        at, nonce, mac = _parts(proofs[0])
        if sum(hmac.compare_digest(_mac(key, _CALLER, path, at, nonce, hello), mac) for key in self._keys) == 0:
            raise SecretRefused(
                "the caller's cluster secret is not ours: give both the same --cluster-secret-file "
                "(or DISTSERVE_CLUSTER_SECRET)"
            )
        now = self._clock()
        apart = abs(now - int(at) / 1000)
        if apart > WINDOW_S:
            raise SecretRefused(f"the clocks of the caller and of this machine are {apart:.0f} s apart: set them")
        self._forget(now)
        if nonce in self._seen:
            raise SecretRefused("this proof of the cluster secret was used before")
        self._seen.add(nonce)
        self._ages.append((now + 2 * WINDOW_S, nonce))

    def answer(self, proof: str) -> str:
        """The callee's side of a proof that was taken: an HMAC under each secret, for only the caller knows which."""
        _, nonce, _ = _parts(proof)
        return " ".join(_answer(key, nonce) for key in self._keys)

    def _forget(self, now: float) -> None:
        while self._ages and self._ages[0][0] < now:
            self._seen.discard(self._ages.popleft()[1])


def fresh() -> str:
    """A new secret: 256 random bits."""
    return secrets.token_urlsafe(32)


def _parts(proof: str) -> tuple[str, str, str]:
    """Time in ms, nonce, MAC."""
    parts = proof.split(" ")
    plain = proof.isascii() and len(parts) == 4 and parts[0] == _VERSION
    if not plain or not parts[1].isdecimal() or len(parts[1]) > 16 or len(parts[2]) != 32:
        raise SecretRefused("the proof of the secret cannot be read: run the same version of distserve everywhere")
    return parts[1], parts[2], parts[3]


def _mac(key: bytes, role: bytes, path: str, at: str, nonce: str, hello: bytes) -> str:
    said = b"\0".join((role, path.encode(), at.encode(), nonce.encode(), hashlib.sha256(hello).digest()))
    return hmac.new(key, said, "sha256").hexdigest()


def _answer(key: bytes, nonce: str) -> str:
    return _mac(key, _CALLEE, "", "", nonce, b"")


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Unsafe(f"cannot read the cluster secret {path}: {why}") from error
