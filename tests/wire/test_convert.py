"""Every event that travels, there and back; and what no correct peer sends, refused with a sentence."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import StrEnum
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distserve.core import events as core_events
from distserve.core.events import Reported, SequenceOutput, Submit, TokensMade
from distserve.core.types import FinishReason, InstanceRef, Load, Member, Token
from distserve.v1 import control_pb2 as pb
from distserve.v1 import core_pb2
from distserve.wire import convert
from distserve.wire.convert import WireError, from_message, from_wire, to_message, to_wire

RELATIONS: tuple[type[Message], ...] = (
    pb.InstanceToController,
    pb.ControllerToInstance,
    pb.GatewayToController,
    pb.ControllerToGateway,
    pb.GatewayToInstance,
    pb.InstanceToGateway,
    pb.PeerMessage,
)
LOCAL = {
    "GatewayLeft",
    "InstanceLeft",
    "GatewayAttached",
    "GatewayLost",
    "Draining",
    "PeerLost",
    "StageSent",
    "StageFailed",
    "StageStored",
    "StageCorrupt",
    "StepDone",
    "StepFailed",
    "StepAbandoned",
    "Submitted",
    "ClientCancelled",
    "InstanceFound",
    "InstanceLost",
    "ControllerLost",
    "ControllerFound",
    "Tick",
}
CARRIED = [(wrapper, arm.name) for wrapper in RELATIONS for arm in wrapper.DESCRIPTOR.oneofs_by_name["event"].fields]
REF = InstanceRef("prefill-0", 2**62 + 1)


def kind_of(wrapper: type[Message], field: str) -> type:
    return getattr(core_events, wrapper.DESCRIPTOR.fields_by_name[field].message_type.name)


def values(hint: Any, name: str = "", message: Any = None) -> st.SearchStrategy[Any]:
    """Anything that an annotation allows and the field of that name in the message holds."""
    arguments = typing.get_args(hint)
    if types.NoneType in arguments:
        return st.none() | values(arguments[0], name, message)
    if typing.get_origin(hint) is tuple:
        if typing.get_origin(arguments[0]) is tuple:
            pairs = st.tuples(st.integers(0, 2**32 - 1), values(float))
            return st.lists(pairs, max_size=3).map(tuple)
        return st.lists(values(arguments[0], name, message), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return cores(hint)
    if issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    if hint is str:
        return st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
    if hint is float:
        return st.floats(allow_nan=False)
    if hint is bool:
        return st.booleans()
    return integers(message.DESCRIPTOR.fields_by_name[name])


def integers(field: Any) -> st.SearchStrategy[int]:
    wide = field.type in (field.TYPE_UINT64, field.TYPE_FIXED64)
    if field.type == field.TYPE_SINT32:
        return st.integers(-(2**31), 2**31 - 1)
    return st.integers(0, 2**64 - 1 if wide else 2**32 - 1)


def cores(kind: type) -> st.SearchStrategy[Any]:
    """Any instance of a core class that travels."""
    hints = typing.get_type_hints(kind)
    message = getattr(core_pb2, kind.__name__, None) or getattr(pb, kind.__name__)
    return st.builds(kind, **{f.name: values(hints[f.name], f.name, message) for f in dataclasses.fields(kind)})


def test_every_event_either_travels_or_is_local() -> None:
    travelling = {kind_of(wrapper, field).__name__ for wrapper, field in CARRIED}
    known = {kind.__name__ for kind in typing.get_args(core_events.Event)}
    assert travelling | LOCAL == known
    assert not travelling & LOCAL


@pytest.mark.parametrize(("wrapper", "field"), CARRIED)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(data=st.data())
def test_there_and_back(wrapper: type[Message], field: str, data: st.DataObject) -> None:
    event = data.draw(cores(kind_of(wrapper, field)))
    sent = to_wire(wrapper, event).SerializeToString()
    assert from_wire(wrapper.FromString(sent)) == event


@settings(max_examples=30, deadline=None, derandomize=True)
@given(member=cores(Member))
def test_values_there_and_back(member: Member) -> None:
    assert from_message(Member, to_message(member)) == member


def test_an_event_is_carried_only_by_its_relation() -> None:
    with pytest.raises(TypeError, match="GatewayToInstance does not carry a Reported"):
        to_wire(pb.GatewayToInstance, Reported(REF, Load()))


def test_a_wrapper_without_a_known_event_is_refused() -> None:
    with pytest.raises(WireError, match="without an event that this version knows"):
        from_wire(pb.PeerMessage())
    # an arm that a later version added: field 99, a message
    later = b"\x9a\x06\x02\x08\x01"
    with pytest.raises(WireError, match="without an event that this version knows"):
        from_wire(pb.PeerMessage.FromString(later))


def test_an_unknown_field_is_skipped() -> None:
    sent = to_wire(pb.InstanceToController, Reported(REF, Load(running=3)))
    later = sent.reported.SerializeToString() + b"\x98\x06\x07"  # field 99, a number
    assert from_wire(pb.InstanceToController(reported=pb.Reported.FromString(later))) == Reported(REF, Load(running=3))


def finished(number: int) -> pb.InstanceToGateway:
    event = TokensMade(REF, (SequenceOutput("r", 65536, 0, (Token(5),), FinishReason.STOP),))
    message = to_wire(pb.InstanceToGateway, event)
    message.tokens_made.outputs[0].finish = number  # type: ignore[assignment]
    return pb.InstanceToGateway.FromString(message.SerializeToString())


def test_enum_values_are_checked() -> None:
    with pytest.raises(WireError, match=r"SequenceOutput.finish has the unknown value 77"):
        from_wire(finished(77))
    with pytest.raises(WireError, match=r"SequenceOutput.finish is missing"):
        from_wire(finished(core_pb2.FINISH_REASON_UNSPECIFIED))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(WireError, match=r"Submit.request is missing"):
        from_wire(pb.GatewayToInstance(submit=pb.Submit(gateway=core_pb2.GatewayRef(id="g", incarnation=1))))
    with pytest.raises(WireError, match=r"InstanceRef.id is missing"):
        from_wire(pb.InstanceToController(reported=pb.Reported(ref=core_pb2.InstanceRef())))
    with pytest.raises(WireError, match=r"Reported.load is missing"):
        from_wire(pb.InstanceToController(reported=pb.Reported(ref=to_message(REF))))


def test_what_is_too_large_or_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = pb.ControllerToInstance(join_refused=pb.JoinRefused(reason="x" * (convert.MAX_TEXT + 1)))
    with pytest.raises(WireError, match=r"JoinRefused.reason has \d+ characters"):
        from_wire(joined)
    with pytest.raises(WireError, match=r"Welcomed.lease_s is not a number"):
        from_wire(pb.ControllerToInstance(welcomed=pb.Welcomed(lease_s=float("nan"))))
    abandon = pb.GatewayToInstance(submit=pb.Submit(delivered=[1, 2, 3]))
    monkeypatch.setattr(convert, "MAX_ITEMS", 2)
    abandon.submit.gateway.id = "g"
    event = to_wire(pb.InstanceToGateway, TokensMade(REF, tuple(SequenceOutput("r", 1, n, ()) for n in range(3))))
    with pytest.raises(WireError, match=r"TokensMade.outputs has 3 entries"):
        from_wire(event)


def test_what_does_not_fit_is_not_sent() -> None:
    with pytest.raises(WireError, match="a Reported does not fit on the wire"):
        to_wire(pb.InstanceToController, Reported(REF, Load(waiting=-1)))


def test_numbers_survive_exactly() -> None:
    event = TokensMade(REF, (SequenceOutput("r", 2**64 - 1, 0, (Token(1, -0.1, ((2, float("-inf")),)),)),))
    assert from_wire(pb.InstanceToGateway.FromString(to_wire(pb.InstanceToGateway, event).SerializeToString())) == event


def test_absent_and_empty_are_told_apart() -> None:
    for logprob in (None, 0.0):
        event = TokensMade(REF, (SequenceOutput("r", 1, 0, (Token(1, logprob),)),))
        back = from_wire(to_wire(pb.InstanceToGateway, event))
        assert isinstance(back, TokensMade)
        assert back.outputs[0].tokens[0].logprob == logprob
        assert (back.outputs[0].tokens[0].logprob is None) == (logprob is None)
    assert Submit in convert._fields_of(pb.GatewayToInstance)
