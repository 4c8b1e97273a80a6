"""Questions that only instances can answer, asked on an operator's behalf: what they hold, whether their blocks add up.

One short call each, on a connection of its own; an instance that does not answer is part of the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio

from distserve.core.types import Endpoint, Load, Member
from distserve.gateway.backend import InstanceView, KvReport
from distserve.v1.control_pb2 import Holding, InspectRequest, InspectResponse, KvCheckRequest
from distserve.v1.control_pb2_grpc import InstanceServiceStub
from distserve.wire.channels import dial, sentence
from distserve.wire.convert import from_message
from distserve.wire.trust import OPEN, Trust, method_path

INSPECT_S = 5.0
KV_CHECK_S = 30.0


async def view(member: Member, *, connected: bool, trust: Trust = OPEN) -> InstanceView:
    """One instance as an operator sees it."""
    try:
        answer = await _inspect(member.endpoint, "", trust)
    except grpc.aio.AioRpcError:
        return InstanceView(member, None, connected, "lost")
    state = "ready" if connected else "connecting"
    return InstanceView(member, from_message(Load, answer.load), connected, state, answer.pid)


async def holdings(endpoints: Sequence[Endpoint], request_id: str, trust: Trust = OPEN) -> list[tuple[str, Holding]]:
    """What the instances hold for a request: (instance, holding). Those that do not answer are left out."""
    answers = await asyncio.gather(*(_inspect(e, request_id, trust) for e in endpoints), return_exceptions=True)
    found: list[tuple[str, Holding]] = []
    for endpoint, answer in zip(endpoints, answers, strict=True):
        if isinstance(answer, InspectResponse):
            found += [(str(endpoint.ref), holding) for holding in answer.holdings]
        elif not isinstance(answer, grpc.aio.AioRpcError):
            raise answer
    return found


async def kv_report(member: Member, trust: Trust = OPEN) -> KvReport:
    """One instance's ledger, counted between two of its steps."""
    name = str(member.ref)
    metadata, _ = trust.prove(method_path(InstanceServiceStub, "KvCheck"))
    async with dial(member.endpoint.address, trust) as channel:
        try:
            answer = await InstanceServiceStub(channel).KvCheck(KvCheckRequest(), timeout=KV_CHECK_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return KvReport(name, member.spec.pool_blocks, {}, 0, f"it did not answer: {sentence(error)}", False)
    return KvReport(name, answer.total, dict(answer.by_state), answer.holders, answer.problem, answer.idle_and_clean)


async def _inspect(endpoint: Endpoint, request_id: str, trust: Trust) -> InspectResponse:
    metadata, _ = trust.prove(method_path(InstanceServiceStub, "Inspect"))
    async with dial(endpoint.address, trust) as channel:
        answer: InspectResponse = await InstanceServiceStub(channel).Inspect(
            InspectRequest(request_id=request_id), timeout=INSPECT_S, metadata=metadata
        )
        return answer
