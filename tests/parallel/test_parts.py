"""The small parts of an instance of several ranks: micro-batches, frames, places, links, crews."""

from __future__ import annotations

import queue
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.effects import AbortSend, CloseTicket, OpenTicket, SendStage
from distserve.core.types import InstanceRef, Sampling, StepItem, StepPlan, Token
from distserve.engine.config import EngineConfig
from distserve.engine.microbatches import cut_step
from distserve.instance.ranks.crew import Crew, RankLost
from distserve.instance.ranks.frames import (
    GREEDY,
    moved_frame,
    moved_of,
    order_frame,
    order_of,
    step_frame,
    step_plan,
    tokens_frame,
    tokens_of,
)
from distserve.instance.ranks.link import LinkClosed, RankLink, proof
from distserve.instance.ranks.muster import Orders, started_place, welcome_of
from distserve.instance.ranks.place import BadPlace, place_of, rank_device
from distserve.instance.ranks.worker import told_config
from distserve.kv.shard import Parallel
from distserve.transfer import StageCorrupt, StageFailed, StageSent, StageStored
from distserve.v1 import ranks_pb2 as pb
from tests.transfer.peers import make_ticket

HERE, THERE = InstanceRef("here", 1), InstanceRef("there", 1 << 62)
ITEMS = st.builds(
    lambda start, count, sample: StepItem(
        "r", start, tuple(range(count)), tuple(range(-(-(start + count) // 4))), sample, sampling=GREEDY
    ),
    st.integers(0, 50),
    st.integers(1, 40),
    st.booleans(),
)


@given(st.lists(ITEMS, min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 30))
def test_micro_batches_are_the_step_in_order(items: list[StepItem], stages: int, least: int) -> None:
    plan = StepPlan(7, tuple(items))
    parts = cut_step(plan, stages, least)
    assert len(parts) <= max(1, min(2 * stages, plan.tokens // least))
    assert (len(parts) == 1) == (stages == 1 or plan.tokens < 2 * least)
    assert max(p.tokens for p in parts) - min(p.tokens for p in parts) <= 1
    flat = [(part.number, item) for part in parts for item in part.items]
    assert [i for _, item in flat for i in item.token_ids] == [i for item in items for i in item.token_ids]
    assert sum(item.sample for _, item in flat) == sum(item.sample for item in items)
    rest = iter(flat)
    for item in items:  # the pieces of an item follow each other, and only the last may sample
        at = item.start
        while at < item.start + len(item.token_ids):
            _, piece = next(rest)
            assert piece.start == at and piece.blocks == item.blocks
            at += len(piece.token_ids)
            assert piece.sample == (item.sample and at == item.start + len(item.token_ids))


def sampled_plan() -> StepPlan:
    odd = Sampling(temperature=0.7, seed=(1 << 64) - 1, logit_bias=((3, -1.5),), frequency_penalty=0.5)
    return StepPlan(
        1 << 40,
        (
            StepItem("a", 5, (9, 8, 7), (3, 1), False, sampling=GREEDY),
            StepItem("b", 0, (4,), (2,), True, 6, odd, (1, 2), (4,), (5, 6)),
            StepItem("c", 1, (4,), (0,), True, sampling=GREEDY),
        ),
    )


def test_a_step_comes_as_it_was_sent() -> None:
    plan = sampled_plan()
    sent = pb.RankFrame.FromString(step_frame(plan, sampling=True).SerializeToString())
    found = step_plan(sent.step)
    assert found.number == plan.number
    for item, same in zip(found.items, plan.items, strict=True):
        assert (item.start, item.token_ids, item.blocks, item.sample) == (
            same.start,
            same.token_ids,
            same.blocks,
            same.sample,
        )
    assert found.items[1].sampling == plan.items[1].sampling
    assert (found.items[1].banned, found.items[1].prompt, found.items[1].output) == ((1, 2), (4,), (5, 6))
    assert found.items[1].output_index == 6
    bare = step_plan(step_frame(plan, sampling=False).step)
    assert all(item.sampling == GREEDY for item in bare.items)


@pytest.mark.parametrize("field", ["heads", "token_ids", "blocks"])
def test_a_step_whose_parts_do_not_fit_is_refused(field: str) -> None:
    step = step_frame(sampled_plan(), sampling=True).step
    setattr(step, field, getattr(step, field) + bytes(4))
    with pytest.raises(ValueError):
        step_plan(step)


def test_orders_and_what_comes_of_them_cross_unchanged() -> None:
    ticket = make_ticket(1, HERE, THERE, 30, 2)
    orders = [
        OpenTicket(ticket, (4, 2)),
        CloseTicket("m"),
        SendStage(ticket, "tp2pp1/h:1,h:2", 2, 30, (1, 5), True),
        AbortSend("m"),
        THERE,
    ]
    assert [order_of(order_frame(3, order).order) for order in orders] == orders
    events = [
        StageSent("m", 0, 4, 100, 0.5),
        StageFailed("m", "peer", True, 0, 4, "gone"),
        StageStored("m", (1 << 64) - 1, 0, 4, 100),
        StageCorrupt("m", 7, "a wrong byte"),
    ]
    assert [moved_of(moved_frame(event).moved) for event in events] == events
    tokens = [Token(3), Token(4, -0.5, ((4, -0.5), (1, -1.5)))]
    assert tokens_of(tokens_frame(2, tokens).tokens) == tokens
    with pytest.raises(ValueError):
        order_of(pb.RankOrder())


PLACED = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}


def test_a_place_is_read_from_the_environment_or_refused_in_a_sentence() -> None:
    assert place_of({}, Parallel(2, 2)) is None
    assert place_of(PLACED, Parallel(1, 1)) is None
    place = place_of(PLACED | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, Parallel(2, 2))
    assert place is not None and (place.rank, place.world, place.host, place.port) == (3, 4, "node-0", 29500)
    assert place.local_rank == 1 and not place.keeper
    first = place_of(PLACED | {"RANK": "0"}, Parallel(4, 1))
    assert first is not None and first.keeper
    for wrong in ({"WORLD_SIZE": "8"}, {"RANK": "x"}, {"RANK": "4"}, {"MASTER_PORT": ""}):
        with pytest.raises(BadPlace):
            place_of(PLACED | wrong, Parallel(2, 2))
    assert [rank_device(name, 2) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:2", "cuda:3"]


def test_ranks_of_a_machine_have_cores_of_their_own_where_they_suffice() -> None:
    layout = Parallel(2, 1)
    first = started_place(layout, 1)
    second = place_of(first.environ() | {"RANK": "1", "LOCAL_RANK": "1"}, layout)
    assert second is not None
    assert [place.cores((4, 5, 6, 7), 2) for place in (first, second)] == [(4, 5), (6, 7)]
    assert [place.cores((4, 5, 6), 2) for place in (first, second)] == [(4, 5, 6)] * 2
    assert second.cores((), 1) == ()
    elsewhere = place_of(PLACED, Parallel(2, 2))  # not told how many ranks are on its machine
    assert elsewhere is not None and elsewhere.cores((0, 1), 1) == (0, 1)


def test_every_rank_is_told_what_the_instance_was_told() -> None:
    config = EngineConfig(
        model="m",
        dtype="bfloat16",
        pool_blocks=7,
        block_size=8,
        max_model_len=99,
        threads=3,
        kernels="native",
        cuda_graphs="off",
    )
    orders = Orders(HERE, Parallel(2, 2), "shm", 30.0, "info", b"", (b"k",), 0)
    sent = welcome_of(config, orders, (2, 3))
    welcome = pb.RankWelcome.FromString(sent.SerializeToString())
    assert told_config(welcome, 1) == config
    assert tuple(welcome.cores) == (2, 3)


class Watched:
    """A crew of one rank whose other end is ours, and what it told."""

    def __init__(self, timeout_s: float = 30.0) -> None:
        ours, theirs = socket.socketpair()
        self.rank = RankLink(theirs, 5.0)
        self.lost: queue.Queue[str] = queue.Queue()
        self.crew = Crew(
            {1: RankLink(ours, 5.0)},
            Parallel(1, 2),
            timeout_s,
            lost=self.lost.put,
            asked=lambda: self.lost.put("asked"),
            report=lambda rank, event: None,
        )


def test_the_end_of_a_link_is_told_once_and_to_whoever_waits() -> None:
    watched = Watched()
    watched.crew.start(sampled_plan())
    assert watched.rank.receive(5.0).step.items == 3
    watched.rank.close()
    with pytest.raises(RankLost, match="rank 1 is gone"):
        watched.crew.tokens(1 << 40)
    assert "rank 1 is gone" in watched.lost.get(timeout=5)
    with pytest.raises(RankLost):
        watched.crew.order(AbortSend("m"), wait=True)
    watched.crew.close()
    assert watched.lost.empty()


def test_a_rank_that_does_not_answer_is_lost_after_the_timeout() -> None:
    watched = Watched(timeout_s=0.2)
    with pytest.raises(RankLost, match="a rank hangs"):
        watched.crew.order(CloseTicket("m"), wait=True)
    assert "a rank hangs" in watched.lost.get(timeout=5)
    watched.crew.close()


def test_last_words_and_a_wish_to_stop_are_heard() -> None:
    watched = Watched()
    watched.rank.send(pb.RankFrame(failed=pb.RankFailed(message="told to stop", asked=True)))
    assert watched.lost.get(timeout=5) == "asked"
    watched.rank.send(pb.RankFrame(failed=pb.RankFailed(message="out of memory")))
    assert watched.lost.get(timeout=5) == "rank 1 cannot go on: out of memory"
    watched.crew.close()


def test_a_link_refuses_what_is_no_frame() -> None:
    ours, theirs = socket.socketpair()
    link = RankLink(ours, 5.0)
    theirs.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(LinkClosed, match="bytes was announced"):
        link.receive(5.0)
    theirs.close()
    link.close()
    assert proof(b"key", b"nonce", 1) != proof(b"key", b"nonce", 2) != proof(b"other", b"nonce", 2)
