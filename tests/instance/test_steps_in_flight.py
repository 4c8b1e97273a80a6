"""How many steps an instance has in flight, and of which kind, by its device and layout."""

from __future__ import annotations

from typing import Any

import pytest

from distserve.instance.loading import engine_config, machine_config, steps_in_flight
from distserve.instance.options import InstanceOptions
from distserve.sched.config import InstanceConfig


def options(**settings: Any) -> InstanceOptions:
    return InstanceOptions(id="i", model="m", model_name="m", controller="127.0.0.1:1", **settings)


@pytest.mark.parametrize(
    ("settings", "count", "follow_up"),
    [
        ({}, 1, False),
        ({"steps_in_flight": 2}, 2, True),
        ({"device": "cuda:0"}, 2, True),
        ({"device": "cuda", "steps_in_flight": 1}, 1, False),
        ({"pp": 2}, 2, False),
        ({"tp": 2, "pp": 3, "device": "cuda"}, 3, False),
        ({"pp": 2, "steps_in_flight": 4}, 4, False),
        ({"tp": 2}, 1, False),
    ],
)
def test_what_an_instance_is_told(settings: dict[str, Any], count: int, follow_up: bool) -> None:
    """Engine and machine agree; only within one rank steps follow one another."""
    given = options(machine=InstanceConfig(max_sequences=7), **settings)
    given.check()
    assert steps_in_flight(given) == engine_config(given).steps_in_flight == count
    wanted = InstanceConfig(max_sequences=7, steps_in_flight=count, follow_up=follow_up)
    assert machine_config(given) == wanted


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps_in_flight": 0}, "--steps-in-flight 0: at least 1 is needed"),
        (
            {"steps_in_flight": 2, "tp": 2},
            "--steps-in-flight 2: ranks of one stage run one step at a time; leave it out",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options(**settings).check()
