"""Who holds and sends what: every (layer, head) of every destination rank comes exactly once, whatever the two cuts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.kv.shard import KvCut, KvPart, Parallel, routes, stage_layers, why_not
from distserve.transfer.address import DataAddress, data_address
from distserve.transfer.errors import PeerGone


def cuts(layers: int, kv_heads: int) -> st.SearchStrategy[KvCut]:
    lanes = [tp for tp in (1, 2, 3, 4, 6, 8) if not max(kv_heads, tp) % min(kv_heads, tp)]
    return st.builds(
        lambda tp, pp: KvCut(Parallel(tp, pp), layers, kv_heads), st.sampled_from(lanes), st.integers(1, layers)
    )


@given(st.data(), st.integers(1, 7), st.sampled_from([1, 2, 3, 4, 8]))
def test_each_part_of_each_rank_comes_once_from_one_that_holds_it(
    data: st.DataObject, layers: int, kv_heads: int
) -> None:
    source, destination = data.draw(cuts(layers, kv_heads)), data.draw(cuts(layers, kv_heads))
    came: Counter[tuple[int, int, int]] = Counter()
    for route in routes(source, destination):
        assert route.part.within(source.part(route.source))
        assert route.part.within(destination.part(route.destination))
        came.update((route.destination, layer, head) for layer in route.part.layers for head in route.part.heads)
    wanted = [
        (rank, layer, head)
        for rank in range(destination.parallel.ranks)
        for layer in destination.part(rank).layers
        for head in destination.part(rank).heads
    ]
    assert came == Counter(wanted)


@given(st.integers(1, 40), st.integers(1, 8))
def test_stages_hold_all_layers_and_differ_by_one_at_most(layers: int, pp: int) -> None:
    stages = stage_layers(layers, pp)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_copies_of_a_head_take_turns_in_sending() -> None:
    """4 lanes hold 1 head four times over: each of 4 lanes elsewhere is served by another."""
    found = routes(KvCut(Parallel(4), 2, 1), KvCut(Parallel(4), 2, 1))
    assert [(route.source, route.destination) for route in found] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_heads_are_copied_to_adjacent_lanes() -> None:
    cut = KvCut(Parallel(4, 2), 3, 2)
    assert [cut.part(rank) for rank in (0, 1, 3, 6)] == [
        KvPart(range(2), range(1)),
        KvPart(range(2), range(1)),
        KvPart(range(2), range(1, 2)),
        KvPart(range(2, 3), range(1, 2)),
    ]


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (Parallel(0, 1), "at least 1"),
        (Parallel(5, 1), "does not divide the model's 12 attention heads"),
        (Parallel(3, 1), "neither divides the model's 4 KV heads nor is a multiple"),
        (Parallel(1, 9), "more stages than the model's 8 layers"),
        (Parallel(4, 8), ""),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_said_in_a_sentence(parallel: Parallel, words: str) -> None:
    said = why_not(parallel, layers=8, heads=12, kv_heads=4)
    assert words in said and bool(words) == bool(said)


def test_an_address_names_the_mover_of_every_rank() -> None:
    assert data_address(Parallel(), ["h:1"]) == "h:1"
    text = data_address(Parallel(2, 1), ["h:1", "[::1]:2"])
    assert DataAddress.parse(text) == DataAddress(Parallel(2, 1), ("h:1", "[::1]:2"))
    assert DataAddress.parse("h:1") == DataAddress(Parallel(), ("h:1",))
    for wrong in ("tp2pp2/h:1,h:2", "tp2pp1/h:1,", "tp1pp1/"):
        with pytest.raises(PeerGone):
            if DataAddress.parse(wrong).movers == (wrong,):
                raise PeerGone(wrong)  # taken for a plain address, which leads nowhere
