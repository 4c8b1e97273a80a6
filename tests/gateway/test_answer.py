"""Answers: what a choice says is a function of its tokens, however they arrive, and equals the offline cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.core.types import Code, FinishReason, Request, Sampling, Stopping, Token
from distserve.gateway.answer import Choice, Ended, Piece
from distserve.gateway.ask import Ask
from distserve.gateway.backend import RequestFailed, StreamEvent
from distserve.gateway.detokenize import Detokenizer, StopFinder
from distserve.gateway.frontend import FrontEnd
from distserve.gateway.text import TextCodec
from tests.gateway.fake_backend import FakeBackend, Script
from tests.gateway.tokenizers_for_tests import byte_level

CODEC = TextCodec(byte_level())
WORDS = list(CODEC.encode("the answer 🙂 in a place\n世 fox. ab abab"))
IDS = st.lists(st.sampled_from([*WORDS, 0, 2]), max_size=30)
STOPS = st.lists(st.sampled_from(["answer", " in a", "🙂", "ab", "bab", "\n", "e p", ". a"]), max_size=3, unique=True)


def choice(stops: Sequence[str], stop_ids: Sequence[int], min_tokens: int, include: bool) -> Choice:
    request = Request("r", "tiny", (1,), Sampling(), Stopping(99, min_tokens, tuple(stop_ids)), 60.0)
    return Choice(0, request, Detokenizer(CODEC), StopFinder(stops), include)


def take(made: Choice, ids: Sequence[int], sizes: Sequence[int]) -> tuple[str, list[int], list[int], str | int | None]:
    """Feed tokens in groups; returns text, tokens used, their offsets, and what matched."""
    text, rest = "", list(ids)
    used: list[int] = []
    offsets: list[int] = []
    for size in [*sizes, len(ids)]:
        if not rest or made.matched is not None:
            break
        piece = made.take([Token(i) for i in rest[: max(size, 1)]])
        rest = rest[max(size, 1) :]
        text += piece.text
        used += [token.id for token in piece.tokens]
        offsets += piece.offsets
    return text + made.rest(), used, offsets, made.matched


@settings(max_examples=400, deadline=None)
@given(IDS, STOPS, st.booleans(), st.integers(0, 6), st.lists(st.integers(1, 7), max_size=20))
def test_grouping_changes_nothing(
    ids: list[int], stops: list[str], include: bool, min_tokens: int, sizes: list[int]
) -> None:
    one_by_one = take(choice(stops, (2,), min_tokens, include), ids, [1] * len(ids))
    assert take(choice(stops, (2,), min_tokens, include), ids, sizes) == one_by_one


@settings(max_examples=400, deadline=None)
@given(IDS.filter(lambda ids: 2 not in ids), STOPS)
def test_the_cut_is_the_offline_cut(ids: list[int], stops: list[str]) -> None:
    """Decode everything, cut at the first stop text; the tokens used are those up to the one that completed it."""
    text, used, offsets, matched = take(choice(stops, (), 0, include=False), ids, [1] * len(ids))
    whole = CODEC.decode(ids)
    ends = sorted((whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole)
    if not ends:
        assert (text, used, matched) == (whole, ids, None)
        return
    end, start, stop = ends[0]
    assert (text, matched) == (whole[:start], stop)
    assert len(CODEC.decode(used)) >= end
    assert len(CODEC.decode(used[:-1]).rstrip("\ufffd")) < end or not matched
    assert offsets == sorted(offsets)


@settings(max_examples=200, deadline=None)
@given(IDS, st.integers(0, 10))
def test_stop_texts_wait_for_min_tokens(ids: list[int], min_tokens: int) -> None:
    _, used, _, matched = take(choice(["a", "e", " "], (), min_tokens, include=False), ids, [1] * len(ids))
    assert matched is None or len(used) >= min_tokens


async def test_a_stream_without_an_end_is_an_error(backend: FakeBackend, codec: TextCodec) -> None:
    front_end = FrontEnd(backend, {"tiny": codec})
    for n in (1, 2):
        answer = await front_end.open(await front_end.plan(Ask(("x",), n=n, max_tokens=2)))
        for stream in backend.live.values():
            stream._events = _nothing()
        with pytest.raises(RequestFailed) as broken:
            async for _ in answer:
                pass
        await answer.aclose()
        assert broken.value.code is Code.INTERNAL


async def test_a_bug_in_one_choice_ends_them_all(
    backend: FakeBackend, codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads is told of it, with one choice or several, and does not wait for a choice that says no more."""

    def broken(*_: object) -> Piece:
        raise ZeroDivisionError

    monkeypatch.setattr(Choice, "take", broken)
    front_end = FrontEnd(backend, {"tiny": codec})
    for n in (1, 2):
        answer = await front_end.open(await front_end.plan(Ask(("x",), n=n, max_tokens=2)))
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(20):
                async for _ in answer:
                    pass
        await answer.aclose()


async def _nothing() -> AsyncIterator[StreamEvent]:
    """A stream that ends before it says anything."""
    events: tuple[StreamEvent, ...] = ()
    for event in events:
        yield event


async def test_stop_at_the_length_limit_is_a_stop(backend: FakeBackend, codec: TextCodec) -> None:
    """The token that ends the text may be the last one allowed."""
    backend.script = Script(tokens=[65, 2], finish=FinishReason.LENGTH)
    front_end = FrontEnd(backend, {"tiny": codec})
    answer = await front_end.open(await front_end.plan(Ask(("x",), max_tokens=2)))
    *pieces, ended = [event async for event in answer]
    await answer.aclose()
    assert isinstance(ended, Ended) and (ended.reason, ended.matched) == (FinishReason.STOP, 2)
    assert all(isinstance(piece, Piece) for piece in pieces)


async def test_closing_twice_and_unread(backend: FakeBackend, codec: TextCodec) -> None:
    front_end = FrontEnd(backend, {"tiny": codec})
    answer = await front_end.open(await front_end.plan(Ask(("x",), n=3, request_id="r")))
    await answer.aclose()
    await answer.aclose()
    assert set(backend.closed) == {"r-0", "r-1", "r-2"}
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_several_choices_leave_no_task_behind(backend: FakeBackend, codec: TextCodec) -> None:
    backend.script = Script(hold_at=3)
    front_end = FrontEnd(backend, {"tiny": codec})
    answer = await front_end.open(await front_end.plan(Ask(("x",), n=3, max_tokens=9)))
    assert isinstance(await anext(aiter(answer)), Piece)
    await answer.aclose()
    assert len(backend.closed) == 3
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


def test_an_unfinished_character_at_the_end() -> None:
    ids = CODEC.encode("fox 🙃")
    text, _, _, _ = take(choice(["🙂"], (), 0, include=False), ids[:-1], [])
    assert text == CODEC.decode(ids[:-1]) and text.endswith("\ufffd")
