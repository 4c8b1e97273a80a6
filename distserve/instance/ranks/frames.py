"""Steps and moves as rank 0 tells them to the other ranks. Lists of numbers travel as packed 32-bit integers: a step of
256 sequences is a few microseconds of copying, not of Python.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence

from distserve.core.effects import AbortSend, CloseTicket, OpenTicket, SendStage
from distserve.core.types import InstanceRef, Sampling, StepItem, StepPlan, Ticket, Token
from distserve.transfer import MoverEvent, StageCorrupt, StageFailed, StageSent, StageStored
from distserve.v1 import ranks_pb2 as pb
from distserve.wire.convert import from_message, to_message

GREEDY = Sampling(temperature=0.0)
_HEAD = 4  # numbers a step item
Order = OpenTicket | CloseTicket | SendStage | AbortSend | InstanceRef
"""What a data plane is told; an InstanceRef is a peer that was lost."""


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def step_frame(plan: StepPlan, *, sampling: bool) -> pb.RankFrame:
    """A step; with what the sampling rank needs, if it is for that one."""
    items = plan.items
    heads = array("i")
    for item in items:
        heads.extend((item.start, len(item.token_ids), len(item.blocks), int(item.sample)))
    chosen = [_sampling(i, item) for i, item in enumerate(items) if item.sample] if sampling else ()
    step = pb.RankStep(
        number=plan.number,
        items=len(items),
        heads=_packed(heads),
        token_ids=_pack(token for item in items for token in item.token_ids),
        blocks=_pack(block for item in items for block in item.blocks),
        sampling=[each for each in chosen if each is not None],
    )
    return pb.RankFrame(step=step)


def step_plan(step: pb.RankStep) -> StepPlan:
    """The step, of nameless items. ValueError when its parts do not fit together."""
    heads, tokens, blocks = _unpack(step.heads), _unpack(step.token_ids), _unpack(step.blocks)
    if len(heads) != _HEAD * step.items:
        raise ValueError(f"step {step.number} has {len(heads)} numbers for {step.items} items")
    how = {each.item: each for each in step.sampling}
    items = []
    token_at = block_at = 0
    for i in range(step.items):
        start, count, held, sample = heads[_HEAD * i : _HEAD * (i + 1)]
        items.append(
            _item(
                start,
                tuple(tokens[token_at : token_at + count]),
                tuple(blocks[block_at : block_at + held]),
                bool(sample),
                how.get(i),
            )
        )
        token_at, block_at = token_at + count, block_at + held
    if (token_at, block_at) != (len(tokens), len(blocks)):
        raise ValueError(f"step {step.number} has tokens or blocks that no item names")
    return StepPlan(step.number, tuple(items))


def _sampling(index: int, item: StepItem) -> pb.RankSampling | None:
    if item.sampling == GREEDY and not item.banned:
        return None
    return pb.RankSampling(
        item=index,
        sampling=to_message(item.sampling),
        output_index=item.output_index,
        banned=item.banned,
        prompt=item.prompt,
        output=item.output,
    )


def _item(
    start: int, token_ids: tuple[int, ...], blocks: tuple[int, ...], sample: bool, how: pb.RankSampling | None
) -> StepItem:
    if how is None:
        return StepItem("", start, token_ids, blocks, sample, sampling=GREEDY)
    return StepItem(
        "",
        start,
        token_ids,
        blocks,
        sample,
        how.output_index,
        from_message(Sampling, how.sampling),
        tuple(how.banned),
        tuple(how.prompt),
        tuple(how.output),
    )


def tokens_frame(number: int, tokens: Sequence[Token]) -> pb.RankFrame:
    """What the sampling rank chose in a step."""
    return pb.RankFrame(tokens=pb.RankTokens(number=number, tokens=[to_message(token) for token in tokens]))


def tokens_of(message: pb.RankTokens) -> list[Token]:
    return [from_message(Token, token) for token in message.tokens]


# ── moves ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def order_frame(number: int, order: Order) -> pb.RankFrame:
    """Something for a data plane. ``number`` 0: no answer is wanted."""
    message = pb.RankOrder(number=number)
    match order:
        case OpenTicket(ticket, blocks):
            message.open_ticket.ticket.CopyFrom(to_message(ticket))
            message.open_ticket.blocks = _pack(blocks)
        case CloseTicket(move_id):
            message.close_ticket = move_id
        case SendStage(ticket, address, start, end, blocks, final):
            stage = message.send_stage
            stage.ticket.CopyFrom(to_message(ticket))
            stage.address, stage.start, stage.end, stage.final = address, start, end, final
            stage.blocks = _pack(blocks)
        case AbortSend(move_id):
            message.abort_send = move_id
        case InstanceRef():
            message.peer_lost.CopyFrom(to_message(order))
    return pb.RankFrame(order=message)


def order_of(message: pb.RankOrder) -> Order:
    """What the data plane is told. ValueError when it is nothing we know."""
    match message.WhichOneof("kind"):
        case "open_ticket":
            opened = message.open_ticket
            return OpenTicket(from_message(Ticket, opened.ticket), tuple(_unpack(opened.blocks)))
        case "close_ticket":
            return CloseTicket(message.close_ticket)
        case "send_stage":
            stage = message.send_stage
            ticket, blocks = from_message(Ticket, stage.ticket), tuple(_unpack(stage.blocks))
            return SendStage(ticket, stage.address, stage.start, stage.end, blocks, stage.final)
        case "abort_send":
            return AbortSend(message.abort_send)
        case "peer_lost":
            return from_message(InstanceRef, message.peer_lost)
        case other:
            raise ValueError(f"an order of kind {other} is not known here")


def moved_frame(event: MoverEvent) -> pb.RankFrame:
    """What a rank's data plane tells."""
    return pb.RankFrame(moved=_MOVED[type(event)](event))


def moved_of(message: pb.RankMoved) -> MoverEvent:
    """The same, at rank 0. ValueError when it is nothing we know."""
    m = message
    match m.kind:
        case pb.RANK_MOVE_KIND_SENT:
            return StageSent(m.move_id, m.start, m.end, m.nbytes, m.seconds)
        case pb.RANK_MOVE_KIND_FAILED:
            return StageFailed(m.move_id, m.reason, m.retriable, m.start, m.end, m.detail)
        case pb.RANK_MOVE_KIND_STORED:
            return StageStored(m.move_id, m.nonce, m.start, m.end, m.nbytes)
        case pb.RANK_MOVE_KIND_CORRUPT:
            return StageCorrupt(m.move_id, m.nonce, m.reason)
        case other:
            raise ValueError(f"a stage event of kind {other} is not known here")


def _sent(e: StageSent) -> pb.RankMoved:
    return pb.RankMoved(
        kind=pb.RANK_MOVE_KIND_SENT, move_id=e.move_id, start=e.start, end=e.end, nbytes=e.nbytes, seconds=e.seconds
    )


def _failed(e: StageFailed) -> pb.RankMoved:
    return pb.RankMoved(
        kind=pb.RANK_MOVE_KIND_FAILED,
        move_id=e.move_id,
        reason=e.reason,
        retriable=e.retriable,
        start=e.start,
        end=e.end,
        detail=e.detail,
    )


def _stored(e: StageStored) -> pb.RankMoved:
    return pb.RankMoved(
        kind=pb.RANK_MOVE_KIND_STORED, move_id=e.move_id, nonce=e.nonce, start=e.start, end=e.end, nbytes=e.nbytes
    )


def _corrupt(e: StageCorrupt) -> pb.RankMoved:
    return pb.RankMoved(kind=pb.RANK_MOVE_KIND_CORRUPT, move_id=e.move_id, nonce=e.nonce, reason=e.reason)


_MOVED: dict[type, Callable[..., pb.RankMoved]] = {
    StageSent: _sent,
    StageFailed: _failed,
    StageStored: _stored,
    StageCorrupt: _corrupt,
}


# ── packed numbers ───────────────────────────────────────────────────────────────────────────────────────────────────


def _pack(numbers: Iterable[int]) -> bytes:
    return _packed(array("i", numbers))


def _packed(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _unpack(data: bytes) -> array[int]:
    """ValueError when it is no whole number of them."""
    numbers = array("i")
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
