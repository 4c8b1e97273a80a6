"""From a stream of tokens to a stream of text: whole characters only, stop texts never shown by accident.

Owns what is held back: bytes of an unfinished character, and text that may turn out to be the start of a stop text.
The text that comes out, put together, is a function of the tokens alone, however they were grouped. Pure.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from distserve.gateway.text import TextCodec

_Utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Tokens in, whole characters out."""

    def __init__(self, codec: TextCodec, skip_special_tokens: bool = True) -> None:
        self._codec = codec
        self._skip_special = skip_special_tokens
        self._utf8 = _Utf8(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that are complete with this token; often none, while one is spread over several."""
        if self._skip_special and self._codec.is_special(token_id):
            return ""
        return self._utf8.decode(self._codec.token_bytes(token_id))

    def finish(self) -> str:
        """What an unfinished character is worth at the end: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)


class StopFinder:
    """Finds the first stop text in a text that comes in pieces, and holds back what may be the start of one.

    The first is the one that ends first; of those that end together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Returns (text that may be shown, the stop text found or ""). After a find nothing more may be pushed."""
        if not self._stops or not text:
            return text, ""
        held = self._held + text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            _, start, stop = min(found)
            return held[:start], stop
        keep = self._possible_start(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], ""

    def finish(self) -> str:
        """What was held back, when the text ends without a stop text."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop text begins."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
