"""Giving up a step that runs: a number that any thread sets, and that the forward pass looks at between its layers.

A number instead of a flag: what was meant for one step never ends another. Knows neither requests nor why.
"""

from __future__ import annotations

import ctypes


class StepGivenUp(Exception):
    """The step ended early, as asked. The KV of its tokens may be written in part and is not to be read."""


class StopSign:
    """The number of the step to give up. Step numbers count from 1; one store, so never half seen."""

    def __init__(self) -> None:
        self._number = ctypes.c_int64(0)

    @property
    def address(self) -> int:
        """Where the number stands, an int64, as long as this object lives: for code that does not run in Python."""
        return ctypes.addressof(self._number)

    def set(self, number: int) -> None:
        """Give up this step, if it is the one that runs. From any thread, at any time, without waiting."""
        self._number.value = number

    def check(self, number: int) -> None:
        """Raise StepGivenUp if this step is the one to give up."""
        if self._number.value == number:
            raise StepGivenUp(f"step {number} was given up")
