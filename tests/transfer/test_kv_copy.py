"""Gather, scatter and the cutting of stages, by property, against a loop over tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distserve.transfer.layout import Layout, cut, pieces
from distserve_kernels.kv_copy import PagedBytes
from distserve_kernels.kv_part import runs, shared_spans
from tests.transfer.peers import copy_tokens, make_pool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.sampled_from([1, 2, 3, 4, 7, 8, 16])


@given(st.lists(st.integers(0, 30), max_size=30))
def test_runs_are_adjacent_maximal_and_in_order(blocks: list[int]) -> None:
    found = list(runs(blocks))
    assert [b for first, count in found for b in range(first, first + count)] == blocks
    assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(found))


@given(st.integers(0, 100), st.integers(0, 100), SIZES, SIZES)
def test_shared_spans_tile_the_range_and_cross_no_boundary(start: int, length: int, one: int, other: int) -> None:
    spans = list(shared_spans(start, start + length, one, other))
    assert [at for low, high in spans for at in range(low, high)] == list(range(start, start + length))
    assert all(low // size == (high - 1) // size for low, high in spans for size in (one, other))


@given(st.integers(1, 200), st.integers(1, 200), SIZES, st.integers(1, 5), st.integers(1, 3), st.integers(1, 20_000))
def test_slices_cover_each_byte_of_the_payload_once(
    start: int, length: int, size: int, layers: int, heads: int, piece_bytes: int
) -> None:
    layout = Layout(layers, heads, 4, "float32", size)
    slice_bytes = layout.slot_bytes(piece_bytes)
    assert slice_bytes <= max(piece_bytes, layout.row_bytes)
    seen: list[tuple[int, int]] = []
    for span in cut(layout, start, start + length, slice_bytes):
        rows = span.rows or (0, layout.rows)
        seen += [(block, row) for block in range(span.low, span.high) for row in range(*rows)]
        assert span.nbytes == (span.high - span.low) * (rows[1] - rows[0]) * layout.row_bytes <= slice_bytes
        assert span.first_token == span.low * size
        assert span.start == max(start, span.first_token) and span.end == min(start + length, span.high * size)
    blocks = range(start // size, -(-(start + length) // size))
    assert seen == [(block, row) for block in blocks for row in range(layout.rows)]


@given(st.integers(1, 200), st.integers(1, 200), SIZES, st.integers(1, 20_000), st.integers(1, 9))
def test_pieces_hold_whole_slices_in_order_and_fit_a_slot(
    start: int, length: int, size: int, slice_bytes: int, slices_a_slot: int
) -> None:
    layout = Layout(3, 2, 4, "float32", size)
    slice_bytes = layout.slot_bytes(slice_bytes)
    slices = list(cut(layout, start, start + length, slice_bytes))
    grouped = list(pieces(slices, slice_bytes * slices_a_slot))
    assert [each for piece in grouped for each in piece] == slices
    assert all(0 < sum(each.nbytes for each in piece) <= slice_bytes * slices_a_slot for piece in grouped)
    assert all(len(piece) <= 2**at for at, piece in enumerate(grouped))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), here=SIZES, there=SIZES, dtype=st.sampled_from(DTYPES))
def test_any_range_between_any_two_block_sizes_is_copied_bit_for_bit(
    data: st.DataObject, here: int, there: int, dtype: torch.dtype
) -> None:
    total = data.draw(st.integers(1, 40), "tokens")
    start = data.draw(st.integers(0, total - 1), "start")
    end = data.draw(st.integers(start + 1, total), "end")
    source, target = make_pool(1, 50, here, dtype), make_pool(2, 50, there, dtype)
    table = data.draw(st.permutations(range(50)), "source's blocks")[: -(-total // here)]
    other = data.draw(st.permutations(range(50)), "destination's blocks")[: -(-total // there)]
    slot_bytes = data.draw(st.integers(1, 3 * source[0].nbytes), "piece bytes")
    expected = target.clone()
    copy_tokens(source, tuple(table), expected, tuple(other), start, end)
    move(source, table, target, other, start, end, slot_bytes)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


def move(
    source: torch.Tensor,
    table: Sequence[int],
    target: torch.Tensor,
    other: Sequence[int],
    start: int,
    end: int,
    piece_bytes: int,
) -> None:
    """What the two ends of a link do to the pools, without the link."""
    layout = Layout.of(source, source.shape[4])
    one, two = PagedBytes(source), PagedBytes(target)
    slot_bytes = layout.slot_bytes(piece_bytes)
    staged = one.staging(torch.zeros(slot_bytes, dtype=torch.uint8))
    for span in cut(layout, start, end, slot_bytes):
        one.gather(table[span.low : span.high], staged, span.rows)
        two.scatter(other, staged[: span.nbytes], layout.block_size, span.first_token, span.start, span.end, span.rows)


@pytest.mark.gpu
@pytest.mark.parametrize(("here", "there"), [(16, 16), (16, 24), (8, 16)])
def test_a_pool_on_a_device_is_copied_the_same(here: int, there: int) -> None:
    source, target = make_pool(1, 20, here), make_pool(2, 20, there)
    table, other = list(range(3, 12)), list(range(11, 2, -1))
    end = min(here, there) * 9 - 3
    expected = target.clone()
    copy_tokens(source, tuple(table), expected, tuple(other), 5, end)
    on_device = target.cuda()
    one, two = PagedBytes(source.cuda()), PagedBytes(on_device)
    layout = Layout.of(source, here)
    staged = torch.zeros(layout.slot_bytes(1 << 20), dtype=torch.uint8)  # host staging, as the shm and gloo lanes have
    for span in cut(layout, 5, end, len(staged)):
        one.gather(table[span.low : span.high], one.staging(staged), span.rows)
        two.scatter(other, two.staging(staged)[: span.nbytes], here, span.first_token, span.start, span.end, span.rows)
    assert torch.equal(on_device.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_a_pool_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous tensor"):
        PagedBytes(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="block_size 8"):
        Layout.of(make_pool(1, 2, 16), 8)
