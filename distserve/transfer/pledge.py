"""How two movers show each other that they hold the same ticket, before anything else is opened for a link.

The ticket's nonce, which only the granting instance and the one it granted to were told, is the key of three HMACs over
both lives, the move and two fresh nonces; with a cluster secret the key needs that, too. The nonce itself is not said,
and nothing that was said before is of use again::

    source                               destination
    Hello: move, nonce a, HMAC(a)  ────▶ (is there such a ticket, and is it yours?)
                                   ◀──── Challenge: nonce b, HMAC(a, b)
    Proof: HMAC(a, b)              ────▶ (now a lane is offered)

Knows frames and tickets; no lane.
"""

from __future__ import annotations

import hmac
import secrets
import struct
import time
from collections.abc import Sequence

from distserve.core.types import InstanceRef, Ticket
from distserve.transfer.channel import Channel
from distserve.transfer.errors import Garbled, NoTicket, refusal_of
from distserve.transfer.stage import ref_from_wire
from distserve.v1 import transfer_pb2 as pb

NONCE_BYTES = 16
_HELLO, _CHALLENGE, _PROOF = b"hello", b"challenge", b"proof"


def sign(hello: pb.TransferHello, ticket: Ticket, keys: Sequence[bytes]) -> None:
    """Put into a hello which ticket its sender holds, and proof of it. ``keys``: of the cluster's secrets."""
    hello.move_id = ticket.move_id
    hello.nonce = secrets.token_bytes(NONCE_BYTES)
    hello.proof = _mac(_key(ticket, _own(keys)), _HELLO, ticket, hello.nonce)


def keep(channel: Channel, hello: pb.TransferHello, ticket: Ticket, keys: Sequence[bytes], deadline: float) -> None:
    """The source's part after its hello. NoTicket when the destination will not have us, or is not who it says."""
    frame = channel.receive(max(0.0, deadline - time.monotonic()))
    if frame.HasField("refusal"):
        raise refusal_of(frame.refusal)
    if not frame.HasField("challenge") or len(frame.challenge.nonce) != NONCE_BYTES:
        raise Garbled("a challenge was expected in the handshake")
    key, second = _key(ticket, _own(keys)), frame.challenge.nonce
    if not hmac.compare_digest(_mac(key, _CHALLENGE, ticket, hello.nonce, second), frame.challenge.proof):
        raise NoTicket(f"who answers for {ticket.destination} does not know the ticket of move {ticket.move_id}")
    proof = pb.TransferProof(proof=_mac(key, _PROOF, ticket, hello.nonce, second))
    channel.send(pb.TransferFrame(proof=proof))


def demand(
    channel: Channel,
    hello: pb.TransferHello,
    ticket: Ticket | None,
    me: InstanceRef,
    keys: Sequence[bytes],
    deadline: float,
) -> None:
    """The destination's part. ``ticket``: the open one that the hello names, if there is. NoTicket with a sentence."""
    source = ref_from_wire(hello.source)
    if ticket is None or ticket.source != source or ticket.destination != me:
        raise NoTicket(f"{source} has no open ticket for move {hello.move_id[:80]!r} at {me}")
    known = [_key(ticket, each) for each in keys or (b"",)]
    fitting = [key for key in known if hmac.compare_digest(_mac(key, _HELLO, ticket, hello.nonce), hello.proof)]
    if not fitting or len(hello.nonce) != NONCE_BYTES:
        hint = "; is its cluster secret ours?" if keys else "; was it given a cluster secret, and we none?"
        raise NoTicket(f"{source} does not know the ticket of move {ticket.move_id} that it names to {me}{hint}")
    second = secrets.token_bytes(NONCE_BYTES)
    challenge = pb.TransferChallenge(nonce=second, proof=_mac(fitting[0], _CHALLENGE, ticket, hello.nonce, second))
    channel.send(pb.TransferFrame(challenge=challenge))
    frame = channel.receive(max(0.0, deadline - time.monotonic()))
    if not frame.HasField("proof"):
        raise Garbled("a proof was expected in the handshake")
    if not hmac.compare_digest(_mac(fitting[0], _PROOF, ticket, hello.nonce, second), frame.proof.proof):
        raise NoTicket(f"{source} repeated what another said: it does not know the ticket of move {ticket.move_id}")


def _own(keys: Sequence[bytes]) -> bytes:
    return keys[0] if keys else b""


def _key(ticket: Ticket, cluster_key: bytes) -> bytes:
    return hmac.digest(cluster_key, b"distserve ticket" + struct.pack("<Q", ticket.nonce), "sha256")


def _mac(key: bytes, role: bytes, ticket: Ticket, *nonces: bytes) -> bytes:
    """Over the ticket as both hold it: another life, request or epoch gives another."""
    facts = (ticket.move_id, ticket.request_id, ticket.epoch, ticket.source, ticket.destination, ticket.fingerprint)
    parts = (role, *(str(fact).encode() for fact in facts), *nonces)
    return hmac.digest(key, b"".join(struct.pack("<I", len(part)) + part for part in parts), "sha256")
