"""Which part of a model's KV a link carries, when the instances at its ends are cut over ranks. Both ends work it out
from the two cuts, so that nothing has to be believed.
"""

from __future__ import annotations

from distserve.core.types import InstanceRef
from distserve.kv.shard import KvCut, KvPart, Parallel, routes
from distserve.transfer.errors import Refused
from distserve.transfer.stage import ref_from_wire
from distserve.v1 import transfer_pb2 as pb

MOST_RANKS = 4096
"""A peer that says it has more is refused before anything is reckoned."""


def common_part(hello: pb.TransferHello, me: InstanceRef, cut: KvCut, rank: int) -> KvPart:
    """What the source's rank sends to this rank of ours when the two are cut so. Refused if that is nothing."""
    source, there, here = ref_from_wire(hello.source), hello.source_rank, hello.destination_rank
    asked = Parallel(max(1, here.tp), max(1, here.pp))
    if asked != cut.parallel or here.rank != rank:
        raise Refused(
            f"{source} asked for rank {here.rank} of {asked}, but this is rank {rank} of {me}, which is {cut.parallel}"
        )
    theirs = Parallel(max(1, there.tp), max(1, there.pp))
    if theirs.ranks > MOST_RANKS:
        raise Refused(f"{source} says it is {theirs}, which is more than {MOST_RANKS} ranks")
    try:
        sent = routes(cut.recut(theirs), cut)
    except ValueError as error:
        raise Refused(f"{source} cannot be {theirs}: {error}") from None
    for route in sent:
        if (route.source, route.destination) == (there.rank, rank):
            return route.part
    raise Refused(f"rank {there.rank} of {source} has nothing to send to rank {rank} of {me}")


def rank_to_wire(parallel: Parallel, rank: int) -> pb.TransferRank:
    return pb.TransferRank(tp=parallel.tp, pp=parallel.pp, rank=rank)
