"""Core's frozen dataclasses as JSON and back, from their annotations alone.

A value is encoded as its fields; where an annotation is a union of dataclasses, and at the top, the class is named:
``{"Send": {"to": {"InstanceRef": {…}}, "event": {…}}}``. Floats survive exactly, so an encoded effect equals another
if and only if the effects do. Knows the classes of ``distserve.core`` and any that ``register`` adds; knows no file.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from distserve.core import effects, events, moves
from distserve.core import types as core_types

_CLASSES: dict[str, type] = {}


class UndecodableError(ValueError):
    """A journal names a class that is not known, or a value does not fit its annotation."""


def register(*classes: type) -> None:
    """Make frozen dataclasses known by name, beside those of core."""
    for cls in classes:
        if _CLASSES.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"two classes are called {cls.__name__}")


def known() -> tuple[str, ...]:
    """Names of all classes that ``decode`` takes."""
    return tuple(_CLASSES)


def encode(value: Any) -> dict[str, Any]:
    """``{class name: fields}`` of a dataclass instance, ready for ``orjson.dumps``."""
    return {type(value).__name__: _fields(value)}


def decode(type_name: str, data: dict[str, Any]) -> Any:
    """The instance that ``encode`` was given. Raises ``UndecodableError``."""
    cls = _CLASSES.get(type_name)
    if cls is None:
        raise UndecodableError(f"unknown class {type_name!r}")
    try:
        return _decoder(cls)(data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UndecodableError(f"{type_name}: {error}") from error


def decode_tagged(tagged: dict[str, Any]) -> Any:
    """The instance behind ``{class name: fields}``."""
    if len(tagged) != 1:
        raise UndecodableError(f"one class name expected, got {sorted(tagged)}")
    ((type_name, data),) = tagged.items()
    return decode(type_name, data)


def _fields(value: Any) -> Any:
    """The value itself where orjson's own reading of a dataclass says enough, else a dict with the classes named."""
    cls: Any = type(value)
    named = _named_fields(cls)
    if not named:
        return value
    plain = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    for name in named:
        if dataclasses.is_dataclass(plain[name]):
            plain[name] = encode(plain[name])
    return plain


@cache
def _named_fields(cls: type) -> tuple[str, ...]:
    """Fields whose annotation does not settle the class."""
    return tuple(name for name, hint in _hints(cls).items() if _is_dataclass_union(hint))


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()


def _is_dataclass_union(hint: Any) -> bool:
    return sum(dataclasses.is_dataclass(m) for m in _members(hint)) > 1


@cache
def _decoder(hint: Any) -> Callable[[Any], Any]:
    """A function from JSON to a value of this annotation."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass_decoder(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint
    if get_origin(hint) is tuple:
        return _tuple_decoder(get_args(hint))
    if members := _members(hint):
        return _union_decoder(hint, members)
    if hint in (int, float, str, bool, type(None)):
        return _scalar_decoder(hint)
    raise TypeError(f"no way to decode {hint!r}")


def _dataclass_decoder(cls: type) -> Callable[[Any], Any]:
    decoders: dict[str, Callable[[Any], Any]] = {}

    def decode_fields(data: Any) -> Any:
        if not decoders:  # filled on first use, so that a class may refer to itself
            decoders.update((name, _decoder(hint)) for name, hint in _hints(cls).items())
        return cls(**{name: decoders[name](value) for name, value in data.items()})

    return decode_fields


def _tuple_decoder(arguments: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        each = _decoder(arguments[0])
        return lambda data: tuple(each(item) for item in data)
    every = tuple(_decoder(a) for a in arguments)
    return lambda data: tuple(f(item) for f, item in zip(every, data, strict=True))


def _union_decoder(hint: Any, members: tuple[Any, ...]) -> Callable[[Any], Any]:
    if _is_dataclass_union(hint):
        names = {m.__name__ for m in members if dataclasses.is_dataclass(m) and isinstance(m, type)}

        def decode_member(data: Any) -> Any:
            if data is None and type(None) in members:
                return None
            if not names.issuperset(data):
                raise UndecodableError(f"{sorted(data)} is none of {sorted(names)}")
            return decode_tagged(data)

        return decode_member
    (inner,) = (m for m in members if m is not type(None))
    only = _decoder(inner)
    return lambda data: None if data is None else only(data)


def _scalar_decoder(kind: type) -> Callable[[Any], Any]:
    def check(data: Any) -> Any:
        if type(data) is not kind:
            raise UndecodableError(f"{kind.__name__} expected, got {data!r}")
        return data

    return check


for _module in (core_types, moves, events, effects):
    register(
        *(
            c
            for c in vars(_module).values()
            if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == _module.__name__
        )
    )
