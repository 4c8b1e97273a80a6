"""Where an instance's KV can be sent, as one string: ``host:port`` of its mover, or, when it is cut over several ranks,
its layout and a mover for each rank: ``tp2pp1/host:port,host:port``. Opaque to everybody but the data plane.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from distserve.kv.shard import Parallel
from distserve.transfer.errors import PeerGone

_CUT = re.compile(r"tp(\d{1,5})pp(\d{1,5})/(.+)")


@dataclass(frozen=True, slots=True)
class DataAddress:
    """An instance's movers, by rank."""

    parallel: Parallel
    movers: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> DataAddress:
        """PeerGone when the text is no such thing, as with any address that leads nowhere."""
        match = _CUT.fullmatch(text)
        if match is None:
            return cls(Parallel(), (text,))
        parallel, movers = Parallel(int(match[1]), int(match[2])), tuple(match[3].split(","))
        if parallel.ranks != len(movers) or not all(movers):
            raise PeerGone(f"{text!r} names {len(movers)} movers for {parallel.ranks} ranks")
        return cls(parallel, movers)


def data_address(parallel: Parallel, movers: Sequence[str]) -> str:
    """The string for an instance's movers, in the order of their ranks."""
    return movers[0] if parallel.ranks == 1 else f"{parallel}/{','.join(movers)}"
