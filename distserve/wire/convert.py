"""The one place that knows both protobuf and core: values and events there and back.

A core dataclass and the message of the same name have the same fields, so nothing is written by hand: a converter is
compiled once per class from its annotations. Outwards a value becomes a nested dict that protobuf builds from (the
fastest way it offers); inwards everything is checked, and what does not fit raises ``WireError`` with a sentence.

A field that this version does not know is skipped, as protobuf intends; an event or an enum value that it does not
know is refused, because guessing its meaning would be worse than ending the stream.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from distserve.core import events as core_events
from distserve.core.events import Event
from distserve.v1 import control_pb2, core_pb2

MAX_TEXT = 16_384
"""Longest text field taken in, in characters."""

MAX_ITEMS = 1 << 21
"""Longest repeated field taken in."""

M = TypeVar("M", bound=Message)
T = TypeVar("T")
_Encode = Callable[[Any], Any]
_Decode = Callable[[Any], Any]


def _once(make: Callable[[Any], T]) -> Callable[[Any], T]:
    """Keep what is made for each class."""
    made: dict[Any, T] = {}

    def get(kind: Any) -> T:
        try:
            return made[kind]
        except KeyError:
            made[kind] = result = make(kind)
            return result

    return get


# Text that names something, or says where it is, is never empty.
_NAMES = frozenset({"id", "request_id", "move_id", "fingerprint", "address", "name", "model"})


class WireError(ValueError):
    """What came over the wire cannot be what a correct peer sends. The text is a sentence for both ends' logs."""


def to_wire(wrapper: type[M], event: Event) -> M:
    """Wrap an event for its relation, e.g. ``to_wire(GatewayToInstance, Submit(...))``.

    Raises ``TypeError`` when that relation does not carry this event, ``WireError`` when a value does not fit.
    """
    kind = type(event)
    field = _fields_of(wrapper).get(kind)
    if field is None:
        raise TypeError(f"a {wrapper.__name__} does not carry a {kind.__name__}")
    try:
        return wrapper(**{field: _encoder(kind)(event)})
    except (ValueError, TypeError) as error:
        raise WireError(f"a {kind.__name__} does not fit on the wire: {error}") from error


def from_wire(message: Message) -> Event:
    """The event in a wrapper. Raises ``WireError`` for what no correct peer of this version sends."""
    field = message.WhichOneof("event")
    if field is None:
        raise WireError(f"a {type(message).__name__} without an event that this version knows")
    kind = _events_of(type(message))[field]
    event: Event = _decoder(kind)(getattr(message, field))
    return event


def to_message(value: Any) -> Any:
    """A core value (``Member``, ``Load``, …) as the message of the same name."""
    kind = type(value)
    try:
        return _message_class(kind)(**_encoder(kind)(value))
    except (ValueError, TypeError) as error:
        raise WireError(f"a {kind.__name__} does not fit on the wire: {error}") from error


def from_message(kind: type[T], message: Message) -> T:
    """The core value in a message of the same name. Raises ``WireError``."""
    value: T = _decoder(kind)(message)
    return value


# ── wrappers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@_once
def _events_of(wrapper: type[Message]) -> Mapping[str, type]:
    """Which event each arm of a wrapper's ``oneof event`` stands for."""
    arms: Any = wrapper.DESCRIPTOR.oneofs_by_name["event"].fields
    return {arm.name: getattr(core_events, arm.message_type.name) for arm in arms}


@_once
def _fields_of(wrapper: type[Message]) -> Mapping[type, str]:
    return {kind: field for field, kind in _events_of(wrapper).items()}


# ── one class ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """How one field of a core class is carried."""

    name: str
    encode: _Encode | None  # None: as it is
    decode: Callable[[Message], Any]  # takes the whole message; checks presence itself


def _message_class(kind: type) -> type[Message]:
    for module in (core_pb2, control_pb2):
        if hasattr(module, kind.__name__):
            found: type[Message] = getattr(module, kind.__name__)
            return found
    raise TypeError(f"{kind.__name__} has no message: it never travels")


@_once
def _compiled(kind: type) -> tuple[_Field, ...]:
    """The fields of a core class in their order. Raises ``TypeError`` if its message has others."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    have = set(_message_class(kind).DESCRIPTOR.fields_by_name)
    if have != set(names):
        raise TypeError(f"{kind.__name__} and its message differ in {sorted(have ^ set(names))}")
    return tuple(_field(kind.__name__, name, hints[name]) for name in names)


@_once
def _encoder(kind: type) -> _Encode:
    plain = tuple(f.name for f in _compiled(kind) if f.encode is None)
    rest = tuple((f.name, f.encode) for f in _compiled(kind) if f.encode is not None)

    def encode(value: Any) -> dict[str, Any]:
        made = {name: getattr(value, name) for name in plain}
        for name, convert in rest:
            made[name] = convert(getattr(value, name))
        return made

    return encode


@_once
def _decoder(kind: type) -> _Decode:
    readers = tuple(field.decode for field in _compiled(kind))

    def decode(message: Message) -> Any:
        return kind(*[read(message) for read in readers])

    return decode


def _field(owner: str, name: str, hint: Any) -> _Field:
    """Compile one field from its annotation; ``owner`` is for what errors say."""
    where = f"{owner}.{name}"
    if _is_optional(hint):
        (inner,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        return _optional(name, _one(where, name, inner), inner)
    if typing.get_origin(hint) is tuple:
        return _repeated(where, name, typing.get_args(hint)[0])
    return _single(where, name, hint)


def _is_optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


@dataclasses.dataclass(frozen=True, slots=True)
class _One:
    """How a single value is carried. None: as it is."""

    encode: _Encode | None
    decode: _Decode | None


def _one(where: str, name: str, hint: Any) -> _One:
    if dataclasses.is_dataclass(hint):
        return _One(lambda value: _encoder(hint)(value), lambda message: _decoder(hint)(message))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum(where, hint)
    if hint is str:
        return _One(None, _text_reader(where, required=name in _NAMES))
    if hint is float:
        return _One(None, _number_reader(where))
    if hint in (int, bool):
        return _One(None, None)
    raise TypeError(f"{where}: no way to carry {hint}")


def _single(where: str, name: str, hint: Any) -> _Field:
    one = _one(where, name, hint)
    decode = one.decode
    if dataclasses.is_dataclass(hint):
        assert decode is not None

        def read_message(message: Message) -> Any:
            if not message.HasField(name):
                raise WireError(f"{where} is missing")
            return decode(getattr(message, name))

        return _Field(name, one.encode, read_message)
    return _Field(name, one.encode, _reader(name, decode))


def _reader(name: str, decode: _Decode | None) -> Callable[[Message], Any]:
    if decode is None:
        return lambda message: getattr(message, name)
    return lambda message: decode(getattr(message, name))


def _optional(name: str, one: _One, hint: Any) -> _Field:
    read = _reader(name, one.decode)
    encode = one.encode
    return _Field(
        name,
        None if encode is None else lambda value: None if value is None else encode(value),
        lambda message: read(message) if message.HasField(name) else None,
    )


def _repeated(where: str, name: str, hint: Any) -> _Field:
    if typing.get_origin(hint) is tuple:  # (token id, weight)
        return _Field(name, _encode_weights, lambda message: _weights(where, _bounded(where, getattr(message, name))))
    one = _one(where, name, hint)
    encode, decode = one.encode, one.decode
    if decode is None:
        return _Field(name, None, lambda message: tuple(_bounded(where, getattr(message, name))))
    return _Field(
        name,
        None if encode is None else lambda values: [encode(value) for value in values],
        lambda message: tuple([decode(value) for value in _bounded(where, getattr(message, name))]),
    )


# ── single values ────────────────────────────────────────────────────────────────────────────────────────────────────


def _encode_weights(pairs: tuple[tuple[int, float], ...]) -> list[dict[str, Any]]:
    return [{"token_id": token, "weight": weight} for token, weight in pairs]


def _weights(where: str, found: Any) -> tuple[tuple[int, float], ...]:
    check = _number_reader(where)
    return tuple([(pair.token_id, check(pair.weight)) for pair in found])


def _bounded(where: str, items: Any) -> Any:
    if len(items) > MAX_ITEMS:
        raise WireError(f"{where} has {len(items)} entries, more than the {MAX_ITEMS} that are taken")
    return items


def _text_reader(where: str, *, required: bool) -> _Decode:
    def read(text: str) -> str:
        if len(text) > MAX_TEXT:
            raise WireError(f"{where} has {len(text)} characters, more than the {MAX_TEXT} that are taken")
        if required and not text:
            raise WireError(f"{where} is missing")
        return text

    return read


def _number_reader(where: str) -> _Decode:
    def read(number: float) -> float:
        if number != number:
            raise WireError(f"{where} is not a number")
        return number

    return read


def _enum(where: str, kind: type[StrEnum]) -> _One:
    descriptor: EnumDescriptor = core_pb2.DESCRIPTOR.enum_types_by_name[kind.__name__]
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper()
    numbers = {member: descriptor.values_by_name[f"{prefix}_{member.name}"].number for member in kind}
    members = {number: member for member, number in numbers.items()}

    def read(number: int) -> StrEnum:
        if (member := members.get(number)) is None:
            raise WireError(f"{where} is missing" if number == 0 else f"{where} has the unknown value {number}")
        return member

    return _One(numbers.__getitem__, read)
