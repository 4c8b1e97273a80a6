"""KV of other dtypes over links: one byte an element moves like four; two ends of different dtypes do not fit."""

from __future__ import annotations

import pytest
import torch

from distserve.core.types import InstanceRef
from distserve.transfer import StageFailed, StageSent, StageStored
from distserve.transfer.layout import Layout
from tests.transfer.peers import Local, copy_tokens, make_pool, make_ticket, shuffled

A, B = InstanceRef("a", 1), InstanceRef("b", 7)
TOKENS = 45


@pytest.mark.parametrize("kind", ["shm", "gloo"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_a_stage_of_narrow_kv(kind: str, dtype: torch.dtype) -> None:
    source, target = Local(A, make_pool(1, 8, 16, dtype), kind), Local(B, make_pool(2, 12, 8, dtype), kind)
    try:
        here, there = shuffled(3, TOKENS, 8, 16), shuffled(4, TOKENS, 12, 8)
        ticket = make_ticket(1, A, B, TOKENS)
        expected = target.pool.clone()
        copy_tokens(source.pool, here, expected, there, 0, TOKENS)
        target.mover.open_ticket(ticket, there)
        source.mover.send_stage(ticket, target.mover.address, 0, TOKENS, here, True)
        assert isinstance(source.event(), StageSent)
        assert isinstance(target.event(), StageStored)
        assert torch.equal(target.pool.view(torch.uint8), expected.view(torch.uint8))
    finally:
        source.close()
        target.close()


def test_ends_of_different_dtypes_are_refused_naming_both() -> None:
    source, target = Local(A, make_pool(1, 8, 16)), Local(B, make_pool(2, 8, 16, torch.float8_e4m3fn))
    try:
        ticket = make_ticket(1, A, B, TOKENS)
        target.mover.open_ticket(ticket, (0, 1, 2))
        source.mover.send_stage(ticket, target.mover.address, 0, TOKENS, (0, 1, 2), True)
        event = source.event()
        assert isinstance(event, StageFailed)
        assert "dtype float32 and float8_e4m3fn" in event.detail
        assert not event.retriable
    finally:
        source.close()
        target.close()


def test_a_byte_is_an_element() -> None:
    wide, narrow = make_pool(1, 2, 16), make_pool(1, 2, 16, torch.float8_e4m3fn)
    assert 4 * Layout.of(narrow, 16).block_bytes == Layout.of(wide, 16).block_bytes == wide[0].nbytes
