"""Control messages: whatever a peer's stream brings becomes an event or a refusal, and no event breaks a machine.

The machines are the production ones, in the middle of ordinary work; what they are told comes from a peer that may have
gone mad: foreign ids, other epochs, numbers out of all range. ``check()`` holds after each event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.effects import Effect, RunStep, Send
from distserve.core.events import (
    Abandon,
    Abandoned,
    AttemptFailed,
    CommitAsked,
    ControllerFound,
    DispatchAsked,
    Dispatched,
    DispatchRefused,
    GatewayJoined,
    InstanceFound,
    Joined,
    JoinRefused,
    MembersChanged,
    MoveEnded,
    MoveQueried,
    PrefillFinished,
    Reported,
    ReserveGranted,
    SequenceOutput,
    Submitted,
    Tick,
    TokensMade,
    Welcomed,
)
from distserve.core.types import Code, GatewayRef, Load, Role, Timings, Token
from distserve.sched.cluster import ClusterState
from distserve.sched.config import ClusterConfig, GatewayConfig
from distserve.sched.gateway import GatewayState
from distserve.v1 import control_pb2 as pb
from distserve.wire.channels import HELLO_KEY, Hello, HelloRefused, read_hello
from distserve.wire.convert import WireError, from_wire, to_wire
from tests.fuzz.hostile import bent_bytes, bent_messages, bounded, messages
from tests.sched.factory import EPOCH, GATEWAY, instance, member, request, reserve, step_done, submit

ME, PEER = member("p", Role.MIXED), member("d", Role.MIXED)
REQUEST = request("r", prompt=12, max_tokens=4)
LOAD = Load(running=1, kv_free=30, kv_total=32)
ASKED = reserve(REQUEST, PEER, ME)

VALID: dict[type[Message], list[Any]] = {
    pb.InstanceToController: [Joined(ME, LOAD), Reported(ME.ref, LOAD)],
    pb.ControllerToInstance: [MembersChanged(3, (ME, PEER), ()), Welcomed(5.0), JoinRefused("no")],
    pb.GatewayToController: [
        GatewayJoined(GATEWAY), DispatchAsked(GATEWAY, "r", EPOCH, "m", 12, 16), PrefillFinished(GATEWAY, "r", EPOCH),
    ],
    pb.ControllerToGateway: [
        MembersChanged(3, (ME, PEER), ()), Dispatched("r", EPOCH, ME.endpoint, PEER.endpoint),
        DispatchRefused("r", EPOCH, Code.UNAVAILABLE, "none", 1.0),
    ],
    pb.GatewayToInstance: [submit(REQUEST, ME), submit(request("s"), PEER), Abandon(GATEWAY, "r", EPOCH)],
    pb.PeerMessage: [
        ASKED, CommitAsked("mv", PEER.ref, 1, EPOCH, 12, (50,), ()), MoveEnded("mv", PEER.ref, "why"),
        MoveQueried("mv", PEER.ref),
    ],
    pb.InstanceToGateway: [
        TokensMade(ME.ref, (SequenceOutput("r", EPOCH, 0, (Token(5),), None, Timings()),)),
        AttemptFailed(ME.ref, "r", EPOCH, Code.UNAVAILABLE, "died", True, PEER.ref), Abandoned(ME.ref, "r", EPOCH),
    ],
}  # fmt: skip


def decoded(wrapper: type[Message], data: Any) -> Any:
    """An event out of a bent, a random or a broken message; None when it was refused, with a sentence."""
    seed = to_wire(wrapper, data.draw(st.sampled_from(VALID[wrapper])))
    kind = data.draw(st.sampled_from(("bent", "bent", "random", "bytes")))
    try:
        if kind == "bytes":
            message = wrapper.FromString(data.draw(bent_bytes(seed.SerializeToString())))
        else:
            message = data.draw(bent_messages(seed) if kind == "bent" else messages(wrapper))
        event = from_wire(message)
    except DecodeError:
        return None
    except WireError as error:
        assert str(error)
        return None
    to_wire(wrapper, event)  # what was taken in can be said again
    return event


def shaken(
    data: Any, handle: Callable[[Any, float], list[Effect]], check: Callable[[], None], wrappers: list[type[Message]]
) -> list[Effect]:
    """Feed the machine a few events; returns all effects. Steps it asks for are answered."""
    effects: list[Effect] = []
    for now in range(1, data.draw(st.integers(2, 6))):
        event = decoded(data.draw(st.sampled_from(wrappers)), data)
        made = handle(event, float(now)) if event is not None else []
        check()
        while any(isinstance(e, RunStep) for e in made):
            effects += made
            made = handle(step_done(made), float(now))
            check()
        effects += made
    effects += handle(Tick(), 1e6)
    check()
    return effects


@bounded(100)
@given(data=st.data())
def test_an_instance_told_nonsense(data: st.DataObject) -> None:
    state = instance(ME)
    state.handle(submit(REQUEST, PEER), 0.0)
    for effect in state.handle(ASKED, 0.5):
        if isinstance(effect, Send) and isinstance(effect.event, ReserveGranted):
            assert effect.event.ticket.total_tokens <= ME.spec.pool_tokens
    shaken(data, state.handle, state.check, [pb.GatewayToInstance, pb.PeerMessage, pb.ControllerToInstance])


@bounded(70)
@given(data=st.data())
def test_a_controller_told_nonsense(data: st.DataObject) -> None:
    state = ClusterState(ClusterConfig())
    for event in (GatewayJoined(GATEWAY), Joined(ME, LOAD), Joined(PEER, LOAD)):
        state.handle(event, 0.0)
    shaken(data, state.handle, state.check, [pb.GatewayToController, pb.InstanceToController])


@bounded(70)
@given(data=st.data())
def test_a_gateway_told_nonsense(data: st.DataObject) -> None:
    state = GatewayState(GatewayRef("g", 1), GatewayConfig())
    for event in (
        ControllerFound(), MembersChanged(1, (ME, PEER), ()), InstanceFound(ME.ref), InstanceFound(PEER.ref),
        Submitted(REQUEST), Dispatched("r", EPOCH, ME.endpoint, PEER.endpoint),
    ):  # fmt: skip
        state.handle(event, 0.0)
    shaken(data, state.handle, state.check, [pb.ControllerToGateway, pb.InstanceToGateway])


@bounded(100)
@given(data=st.data())
def test_hellos(data: st.DataObject) -> None:
    valid = Hello(GATEWAY, ME.ref).metadata()[0][1]
    said = data.draw(bent_bytes(valid) | st.binary(max_size=40))
    metadata = data.draw(st.sampled_from((((HELLO_KEY, said),), ((HELLO_KEY, said),) * 2, ())))
    try:
        read_hello(metadata, ME.ref)
    except HelloRefused as error:
        assert str(error)


def test_the_relations_are_all_shaken() -> None:
    found = {name for name, kind in pb.DESCRIPTOR.message_types_by_name.items() if "event" in kind.oneofs_by_name}
    assert found == {wrapper.DESCRIPTOR.name for wrapper in VALID}
