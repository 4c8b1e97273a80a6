"""Who may ask: bearer tokens, the same for HTTP and gRPC. Without keys everybody may."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from distserve.core.types import Code
from distserve.gateway.backend import RequestFailed


class ApiKeys:
    """The keys a gateway takes."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def check(self, authorization: str) -> None:
        """``authorization`` is the header's value, "Bearer KEY". Raises ``RequestFailed`` UNAUTHENTICATED."""
        if not self._keys:
            return
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise RequestFailed(Code.UNAUTHENTICATED, "No API key was sent; send one as 'Authorization: Bearer KEY'.")
        # Compare with every key, so that the time taken tells nothing of which comes close.
        if sum(hmac.compare_digest(key.strip().encode(), known) for known in self._keys) == 0:
            raise RequestFailed(Code.UNAUTHENTICATED, "The API key is not known here; check it with the operator.")
