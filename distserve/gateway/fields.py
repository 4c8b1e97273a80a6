"""A client's JSON object, read field by field with errors that name the field.

Owns the check of types, and which fields say how to sample and stop (the same words in OpenAI HTTP and in the Open
Inference Protocol). Ranges are checked in ``plan``. Knows nothing of either protocol's other fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distserve.core.types import Code
from distserve.gateway.backend import RequestFailed
from distserve.gateway.plan import invalid

_KINDS = {bool: "a truth value", int: "a whole number", float: "a number", str: "a string", list: "a list"}


class Fields:
    """Reads typed values out of a JSON object. ``null`` is the same as absent; unknown fields are never looked at."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def flag(self, name: str) -> bool | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return value

    def number(self, name: str) -> float | None:
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(name, "a number", value)
        return float(value)

    def whole(self, name: str) -> int | None:
        value = self._values.get(name)
        return None if value is None else _whole(name, value)

    def text(self, name: str) -> str | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, str):
            raise _wrong(name, "a string", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A string, or a list of strings."""
        value = self._values.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise _wrong(name, "a string or a list of strings", value)
        return tuple(values)

    def ids(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise _wrong(name, "a list of token ids", value)
        return whole_numbers(name, value)

    def object(self, name: str) -> Mapping[str, Any] | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, dict):
            raise _wrong(name, "an object", value)
        return value

    def biases(self, name: str) -> dict[int, float]:
        """An object from token id (as a string, JSON knows no other) to bias."""
        biases = {}
        for key, bias in (self.object(name) or {}).items():
            if not key.isdecimal() or len(key) > 10 or isinstance(bias, bool) or not isinstance(bias, (int, float)):
                raise invalid(name, f"{name} must map token ids to numbers, but has {key!r:.40}: {shown(bias)}.")
            biases[int(key)] = float(bias)
        return biases


def generation_fields(fields: Fields) -> dict[str, Any]:
    """How to sample and when to stop, as arguments of ``Ask``."""
    return {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "top_k": fields.whole("top_k"),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "seed": fields.whole("seed"),
        "logit_bias": fields.biases("logit_bias"),
        "min_tokens": fields.whole("min_tokens"),
        "stop": fields.texts("stop"),
        "stop_token_ids": fields.ids("stop_token_ids"),
        "ignore_eos": fields.flag("ignore_eos") or False,
        "include_stop": fields.flag("include_stop_str_in_output") or False,
        "skip_special_tokens": fields.flag("skip_special_tokens") is not False,
        "timeout_s": fields.number("timeout_s"),
        "priority": fields.whole("priority") or 0,
        "tenant": fields.text("tenant") or "",
        "slo_class": fields.text("slo_class") or "",
    }


def refuse(fields: Fields, unsupported: Mapping[str, str]) -> None:
    """Refuse fields that ask for what is not built; ``unsupported`` maps each to what to do instead.

    Empty and false values ask for nothing and pass: many clients send them.
    """
    for name, advice in unsupported.items():
        if fields.get(name):
            raise RequestFailed(Code.INVALID_ARGUMENT, f"{name} is not supported; {advice}.", param=name)


def whole_numbers(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    """The values, which must all be whole numbers."""
    return tuple(value if type(value) is int else _whole(name, value) for value in values)


def shown(value: Any) -> str:
    """A value as a refusal quotes it. A list or an object by its kind: the repr of a deep one overflows the stack."""
    return _KINDS.get(type(value), "an object") if isinstance(value, (list, dict)) else f"{value!r:.40}"


def _whole(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    raise _wrong(name, "a whole number", value)


def _wrong(name: str, wanted: str, value: Any) -> RequestFailed:
    return invalid(name, f"{name} must be {wanted}, not {_KINDS.get(type(value), 'an object')}.")
