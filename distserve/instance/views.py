"""What an operator may ask of an instance: what it holds, and whether its blocks are accounted for.

Reads the machine, between two steps, in the thread that owns it; changes nothing.
"""

from __future__ import annotations

import os

from distserve.kv.errors import LedgerError
from distserve.sched.arrivals import MoveIn
from distserve.sched.instance import InstanceState
from distserve.sched.lifecycle import InPhase, OutPhase, Phase
from distserve.sched.sequence import Sequence
from distserve.v1.control_pb2 import Holding, InspectResponse, KvCheckResponse
from distserve.wire.convert import to_message

_WAITS: dict[str, str] = {
    Phase.WAITING: "room and a place in a batch",
    Phase.HANDOFF: "the hand-off",
    OutPhase.RESERVING: "a ticket from {destination}",
    OutPhase.STREAMING: "KV to arrive at {destination}",
    OutPhase.COMMITTING: "{destination} to take it over",
    InPhase.PENDING: "room for its KV",
    InPhase.OPEN: "KV from {source}",
}


def inspect(machine: InstanceState, request_id: str, now: float) -> InspectResponse:
    """Everything held, or what is held for one request (empty: all)."""
    held = [_sequence(machine, each, now) for each in machine.residents.sequences.values()]
    held += [_move(machine, each) for each in machine.arrivals.moves.values()]
    return InspectResponse(
        member=to_message(machine.member),
        load=to_message(machine.load()),
        pid=os.getpid(),
        holdings=[each for each in held if request_id in ("", each.request_id)],
    )


def kv_check(machine: InstanceState) -> KvCheckResponse:
    """Count every block and check every invariant. A finding is told, not raised."""
    problem = ""
    try:
        machine.check()
    except (AssertionError, LedgerError) as error:
        problem = str(error) or type(error).__name__
    ledger = machine.residents.ledger
    return KvCheckResponse(
        ref=to_message(machine.me),
        total=ledger.total,
        by_state={str(state): count for state, count in ledger.counts().items()},
        holders=len(machine.residents.sequences) + len(machine.arrivals.moves),
        problem=problem,
        idle_and_clean=machine.idle and not problem and ledger.free + ledger.evictable == ledger.total,
    )


def _sequence(machine: InstanceState, sequence: Sequence, now: float) -> Holding:
    move = machine.departures.of(sequence)
    waits_for = _WAITS.get(sequence.phase, "")
    if move is not None and sequence.phase is Phase.HANDOFF:
        waits_for = _WAITS[move.phase].format(destination=move.destination.ref)
    return Holding(
        request_id=sequence.id,
        epoch=sequence.epoch,
        phase=str(sequence.phase),
        waits_for=waits_for,
        age_s=now - sequence.arrived,
        blocks=_blocks(machine, sequence.owner),
        output_tokens=sequence.output_len,
    )


def _move(machine: InstanceState, move: MoveIn) -> Holding:
    return Holding(
        request_id=move.asked.request.id,
        epoch=move.asked.epoch,
        phase=f"incoming, {move.phase}",
        waits_for=_WAITS[move.phase].format(source=move.asked.source.ref),
        blocks=_blocks(machine, move.owner),
        output_tokens=len(move.asked.output),
    )


def _blocks(machine: InstanceState, owner: str) -> int:
    ledger = machine.residents.ledger
    return len(ledger.table(owner)) if ledger.holds(owner) else 0
