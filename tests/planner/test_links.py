"""Transfers that share links: max-min fair rates, nothing lost, and what each link carried."""

from __future__ import annotations

import random

import pytest

from distserve_planner.simulation.links import Links


def drain(links: Links[str], now: float = 0.0) -> dict[str, float]:
    ends: dict[str, float] = {}
    while (due := links.next_end()) is not None:
        assert due >= now
        now = due
        for payload in links.finish(due):
            ends[payload] = due
    return ends


def test_alone_a_transfer_gets_its_tightest_link() -> None:
    links: Links[str] = Links({"a": 100.0, "b": 50.0})
    links.start(("a", "b"), 500.0, "x", 0.0)
    assert drain(links) == {"x": pytest.approx(10.0)}
    assert links.carried == {"a": 500.0, "b": 500.0}
    assert links.busy_s == {"a": pytest.approx(10.0), "b": pytest.approx(10.0)}


def test_two_share_and_the_one_left_speeds_up() -> None:
    links: Links[str] = Links({"a": 100.0})
    links.start(("a",), 500.0, "x", 0.0)
    links.start(("a",), 1000.0, "y", 0.0)
    assert drain(links) == {"x": pytest.approx(10.0), "y": pytest.approx(15.0)}


def test_what_one_cannot_use_the_other_gets() -> None:
    """x is held to 10 by its own link; y takes the other 90 of the shared one."""
    links: Links[str] = Links({"shared": 100.0, "slow": 10.0})
    links.start(("shared", "slow"), 100.0, "x", 0.0)
    links.start(("shared",), 900.0, "y", 0.0)
    assert drain(links) == {"x": pytest.approx(10.0), "y": pytest.approx(10.0)}


def test_no_link_no_time_and_cancelled_flows_are_gone() -> None:
    links: Links[str] = Links({"a": 1.0})
    links.start((), 1e9, "near", 2.0)
    assert links.next_end() == pytest.approx(2.0)
    assert links.finish(links.next_end() or 0.0) == ["near"]
    links.start(("a",), 100.0, "x", 2.0)
    links.start(("a",), 10.0, "y", 2.0)
    links.cancel(lambda payload: payload == "x", 4.0)
    assert drain(links, 4.0) == {"y": pytest.approx(13.0)}


def test_no_link_ever_carries_more_than_it_can() -> None:
    rng = random.Random(1)
    links: Links[str] = Links({name: rng.uniform(1, 10) for name in "abcdef"})
    now, total = 0.0, 0.0
    for i in range(200):
        now += rng.expovariate(1.0)
        while (due := links.next_end()) is not None and due <= now:
            links.finish(due)
        size = rng.uniform(0.1, 5.0)
        links.start(tuple(rng.sample("abcdef", rng.randint(1, 3))), size, str(i), now)
        total += size
    ends = drain(links, now)
    assert ends
    span = max(ends.values())
    for name, capacity in links.capacity.items():
        assert links.carried[name] <= capacity * links.busy_s[name] * (1 + 1e-9)
        assert links.busy_s[name] <= span * (1 + 1e-9)
