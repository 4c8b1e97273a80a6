"""Hostile inputs: valid things bent a little, or bytes of no shape at all. Strategies for every test of this folder.

``bounded(n)`` is how long a test looks: n examples, always the same, in the suite; FUZZ_EXAMPLES times as many, at
random, remembered and shrunk, under ``make fuzz``. Knows JSON, bytes and protobuf; nothing of what reads them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def bounded(examples: int) -> Any:
    """The settings of one fuzz test."""
    return settings(
        max_examples=examples * max(1, TIMES),
        deadline=None,
        derandomize=TIMES == 0,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if TIMES else [])],
    )


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def bent_bytes(draw: Any, whole: bytes) -> bytes:
    """``whole`` cut short, with bytes flipped, dropped, doubled, or overwritten by an extreme number."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("cut", "flip", "drop", "double", "extreme", "insert"))):
            case "cut":
                del data[at:]
            case "flip" if data:
                data[at] ^= draw(st.integers(1, 255))
            case "drop":
                del data[at : at + draw(st.integers(1, 16))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "extreme":
                width = draw(st.sampled_from((1, 2, 4, 8)))
                value = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
                data[at : at + width] = bytes([value]) * (width - 1) + bytes([draw(st.sampled_from((0, 0x7F, 0xFF)))])
            case _:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = (
    "", " ", "\0", "a\r\nb", "🙂" * 9, "\u202e\ufeff", "<|im_end|>", "x" * 5000, "%s%n", "../../etc/passwd",
    "{{7*7}}",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -0.0, 1, -1, 0.5, 1e-320, 1e308, -1e308, 2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 10**30, 1.5, True, False,
)  # fmt: skip


def nested(depth: int, kind: type) -> Any:
    """A list in a list in a list …, or the same of objects."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def strange(depths: Sequence[int] = (3, 200, 900)) -> st.SearchStrategy[Any]:
    """A value that somebody did not expect here; ``depths`` are how far lists and objects go within each other."""
    small = st.none() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text(max_size=8) | st.integers()
    deep = st.builds(nested, st.sampled_from(depths), st.sampled_from((list, dict)))
    return small | deep | st.lists(small, max_size=3) | st.dictionaries(st.text(max_size=5), small, max_size=3)


@st.composite
def bent_json(draw: Any, valid: Any, known: Sequence[str] = (), depths: Sequence[int] = (3, 200, 900)) -> Any:
    """``valid`` with one to three places replaced, removed or added; ``known`` are keys worth adding at the top."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        value = _bend(draw, value, known, strange(depths))
    return value


def _bend(draw: Any, value: Any, known: Sequence[str], odd: st.SearchStrategy[Any]) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)) < 9:
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(("within", "within", "drop", "add", "add"))):
            case "drop":
                value.pop(key)
            case "add":
                names = st.sampled_from(list(known)) if known else st.text(max_size=6)
                value[draw(names)] = draw(odd)
            case _:
                value[key] = _bend(draw, value[key], (), odd)
        return value
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        value[at] = _bend(draw, value[at], (), odd)
        return value
    return draw(odd)


# ── protobuf ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_FLOATS = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)
_LARGEST_FLOAT32 = 3.4028234663852886e38


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Extreme and ordinary values of a field that is no message. An unknown enum value is one of them."""
    kind = field.cpp_type
    if kind in _BITS:
        low, high = _BITS[kind]
        return st.sampled_from((low, high, 0, 1, min(high, 2**31), min(high, 2**40))) | st.integers(low, high)
    if kind in _FLOATS:
        edges = (float("nan"), float("inf"), float("-inf"), -0.0, 0.5, _LARGEST_FLOAT32, -1.0)
        return st.sampled_from(edges) | st.floats(width=32)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-1, 40) | st.just(2**31 - 1)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=40)
    return st.sampled_from(TEXTS) | st.text(max_size=8)


@st.composite
def messages(draw: Any, kind: type[Message], depth: int = 0) -> Message:
    """Any message of a kind: every field absent, ordinary or extreme."""
    message = kind()
    fill(draw, message, depth)
    return message


def fill(draw: Any, message: Any, depth: int = 0) -> None:
    """Set some of the fields."""
    fields = list(message.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), max_size=6, unique_by=lambda f: f.name)) if fields else ():
        set_field(draw, message, field, depth)


def set_field(draw: Any, message: Any, field: FieldDescriptor, depth: int = 0) -> None:
    """Give a field a value, whatever it had."""
    if _is_map(field):
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        if value.message_type is not None:
            fill(draw, getattr(message, field.name)[draw(scalars(key))], depth + 1)
        else:
            getattr(message, field.name)[draw(scalars(key))] = draw(scalars(value))
    elif field.is_repeated:
        _fill_repeated(draw, getattr(message, field.name), field, depth)
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
        if depth < 4:
            fill(draw, getattr(message, field.name), depth + 1)
    else:
        setattr(message, field.name, draw(scalars(field)))


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _fill_repeated(draw: Any, items: Any, field: FieldDescriptor, depth: int) -> None:
    for _ in range(draw(st.integers(0, 3))):
        if field.message_type is None:
            items.append(draw(scalars(field)))
        elif depth < 4:
            fill(draw, items.add(), depth + 1)


@st.composite
def bent_messages(draw: Any, valid: Message) -> Message:
    """``valid`` with one to three of its fields, at any depth, cleared or replaced."""
    message = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        _bend_message(draw, message)
    return message


def _bend_message(draw: Any, message: Any) -> None:
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    present = [field for field, _ in message.ListFields() if field.message_type is not None and not _is_map(field)]
    if present and draw(st.booleans()):
        field = draw(st.sampled_from(present))
        value = getattr(message, field.name)
        if field.is_repeated:
            value = value[draw(st.integers(0, len(value) - 1))]
        return _bend_message(draw, value)
    field = draw(st.sampled_from(fields))
    if draw(st.integers(0, 3)) == 0:
        message.ClearField(field.name)
    else:
        set_field(draw, message, field)


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Several mappings as one."""
    return {key: value for part in parts for key, value in part.items()}
